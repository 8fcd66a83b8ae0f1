"""The layers of a function: consecutive operations whose locations name the same numbered module."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from moec.ir import Block, Operation, Value
from moec.reference.plan import Step

BEFORE_LAYERS = "before the layers"
AFTER_LAYERS = "after the layers"
WHOLE = "the whole model"

_LAYER = re.compile(r"(?:^|.*?\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Segment:
    """Consecutive steps. `outputs` are the values that they compute and later steps or the return read."""

    name: str
    steps: tuple[Step, ...]
    outputs: tuple[Value, ...]


def layer_of(op: Operation) -> str | None:
    """`model.layers.3` for an operation at `model.layers.3.mlp.gate`; None outside of numbered modules."""
    found = _LAYER.match(op.location.name)
    return found.group() if found else None


def layer_segments(block: Block, steps: Sequence[Step]) -> tuple[Segment, ...]:
    """Cuts the steps of a block where a layer begins, and behind the last operation of the last layer.

    An operation outside of all layers belongs to the layer that it follows. A function without numbered modules is one
    segment called `WHOLE`.
    """
    names = [layer_of(step.op) for step in steps]
    numbered = [at for at, name in enumerate(names) if name is not None]
    if not numbered:
        return (_segment(WHOLE, tuple(steps), block),)
    cuts: list[tuple[int, str]] = [(0, BEFORE_LAYERS)]
    seen: set[str] = set()
    for at in numbered:
        name = names[at]
        assert name is not None
        if name not in seen:
            seen.add(name)
            cuts.append((at, name))
    cuts.append((numbered[-1] + 1, AFTER_LAYERS))
    ends = [start for start, _ in cuts[1:]] + [len(steps)]
    spans = [(name, start, end) for (start, name), end in zip(cuts, ends, strict=True) if end > start]
    return tuple(_segment(name, tuple(steps[start:end]), block) for name, start, end in spans)


def whole(block: Block, steps: Sequence[Step]) -> tuple[Segment, ...]:
    """All steps as one segment."""
    return (_segment(WHOLE, tuple(steps), block),)


def _segment(name: str, steps: tuple[Step, ...], block: Block) -> Segment:
    inside = {inner for step in steps for inner in step.op.walk()}
    outputs = [
        result for step in steps for result in step.op.results if any(user not in inside for user in result.users)
    ]
    return Segment(name, steps, tuple(outputs))
