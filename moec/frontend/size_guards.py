"""Whether a traced program holds for all sizes, or only for those that its branches assumed."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils._sympy.numbers import int_oo

from moec.errors import UnsupportedModelError

# torch.export assumes that a size of any value is not 0 or 1; the operations it gives hold for those too.
_SMALLEST_SIZE = 2
_SIZE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")
_NOT_ONE = re.compile(r" != [01]$")
_FUNCTIONS = {"min": min, "max": max, "abs": abs, "math": math}
_TRIED_SIZES = (2, 3, 5, 7, 16, 31, 64, 100, 255, 256, 257, 1000, 1024, 4097, 131072)
_TRIED_TOGETHER = 3


def refuse_fixed_sizes(
    program: ExportedProgram,
    dynamic: Mapping[str, Mapping[int, str]],
    where: str,
    largest: Mapping[str, int] | None = None,
) -> None:
    """Raises UnsupportedModelError if an axis of an input that must be of any size is not, in the traced program.

    `dynamic` gives the meaning of each such axis by input name. Axes of one meaning have one size. `largest`: the size
    of a meaning up to which the model itself is defined, such as the length of its position table.
    """
    limits = dict(largest or {})
    shapes: dict[str, tuple[Any, ...]] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            shapes[node.name] = tuple(value.shape)
    for name, axes in dynamic.items():
        for axis, meaning in axes.items():
            problem = _limit(program, shapes[name][axis], meaning, limits.get(meaning)) if name in shapes else None
            if problem:
                raise UnsupportedModelError(
                    f"the model's code {problem} when it is traced", where=f"{where}, input {name}"
                )
    for guard in program._guards_code or []:
        if _NOT_ONE.search(guard):
            continue
        broken = _counterexample(guard, shapes, dynamic, limits)
        if broken is not None:
            raise UnsupportedModelError(
                f"the model's code takes a path that is wrong for {broken} when it is traced: it assumes "
                f"{_readable(guard, dynamic)}",
                where=where,
            )


def _limit(program: ExportedProgram, size: Any, meaning: str, largest: int | None) -> str | None:
    if isinstance(size, int) or not size.node.expr.free_symbols:
        return f"fixes {meaning} to the example's {size}"
    limits = program.range_constraints.get(size.node.expr)
    if limits is not None and (limits.upper < (largest or int_oo) or limits.lower > _SMALLEST_SIZE):
        return f"takes a path that is right for {meaning} in {limits.lower} .. {limits.upper} only"
    return None


def _readable(guard: str, dynamic: Mapping[str, Mapping[int, str]]) -> str:
    """An assumption with the meanings of sizes instead of torch's expressions for them."""

    def meaning(match: re.Match[str]) -> str:
        return dynamic.get(match[1], {}).get(int(match[2]), match[0])

    return _SIZE.sub(meaning, guard)


def _counterexample(
    guard: str,
    shapes: Mapping[str, tuple[Any, ...]],
    dynamic: Mapping[str, Mapping[int, str]],
    limits: Mapping[str, int],
) -> str | None:
    """Sizes for which an assumption of the trace fails, in words; None if it holds wherever it was tried."""
    meanings = sorted({meaning for axes in dynamic.values() for meaning in axes.values()})
    tried = _TRIED_SIZES if len(meanings) <= 2 else _TRIED_SIZES[:_TRIED_TOGETHER]
    for sizes in itertools.product(tried, repeat=len(meanings)):
        values = dict(zip(meanings, sizes, strict=True))
        if any(size > limits.get(meaning, size) for meaning, size in values.items()):
            continue
        inputs = {}
        for name, shape in shapes.items():
            axes = dynamic.get(name, {})
            full = [values[axes[axis]] if axis in axes else size for axis, size in enumerate(shape)]
            inputs[name] = SimpleNamespace(size=_constantly(full))
        try:
            holds = eval(guard, {"__builtins__": {}, **_FUNCTIONS}, {"L": inputs})
        except (NameError, KeyError, TypeError, AttributeError, SyntaxError):
            # It uses more than sizes of inputs and arithmetic: what it assumes cannot be checked.
            return "sizes that cannot be told"
        if not holds:
            return ", ".join(f"{meaning} = {size}" for meaning, size in values.items())
    return None


def _constantly(value: list[int]) -> Any:
    return lambda: value
