"""Fills the templates: the source of a package from kinds of layers. Nothing of a model's names gets into source."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from moec.codegen.triton.packing import FIRST_COLUMNS, Column
from moec.codegen.triton.spec import PLANE_BLOCK, WIDTH_UNIT, Element, Factors, LayerKind, Product
from moec.dialects.moe import Select

PACKAGE_NAME = "moec_kernels"
"""The name of the package, and of its folder."""

ROUTE_OPERANDS = ("logit_bias", "mask", "select_bias", "per_expert_scale")
"""Vectors with one number per router output that a route may have, in the order of the kernel's arguments."""

_KERNELS = "kernels.py.j2"
_SHARED = ("__init__.py", "blocks.py", "launch.py", "measuring.py", "operators.py", "sorting.py", "tiles.py")
_LINE = 120
_ROUTE_BLOCK = 1024  # numbers of a block of logits
_ONES = {Element.BFLOAT16: (7, 0x3F80), Element.FLOAT16: (10, 0x3C00), Element.FLOAT32: (23, 0x3F800000)}
"""Bits of the fraction, and of the number 1."""
_SHANNON = 1e-6  # orders of entropy this near to 1 are 1, as in the reference
# finite stand-ins for minus infinity: masked, lower than every choice, and taken already
_NEVER, _LOWEST, _TAKEN = "-1.0e30", "-3.3e38", "-3.4e38"


@dataclass(frozen=True)
class Decoder:
    """A function of a kernel file that makes numbers of the codes of one plane of words.

    `place`: the bit where a code belongs in the fraction of a number, `one`: the bits of 1. `halves`: whether both
    halves of a word become numbers at once; then `mask` and `one` are those of both. `less` is taken off each number.
    """

    name: str
    description: str
    halves: bool
    place: int
    mask: str
    one: str
    less: float


def render_package(kinds: Sequence[LayerKind]) -> dict[str, str]:
    """The files of the package by name, without weights and tables. Equal kinds give equal text."""
    found = {}
    for number, kind in enumerate(kinds):
        values = _values(kind, f"kind_{number}")
        found[f"kind_{number}.py"] = _render(_KERNELS, **values)
        found[f"reference_{number}.py"] = _render("reference.py.j2", **values)
    digest = hashlib.sha256("".join(found.values()).encode()).hexdigest()[:12]
    every = range(len(kinds))
    shared = {
        "package": PACKAGE_NAME,
        "kinds": len(kinds),
        "modules": [f"kind_{n}" for n in every] + ["launch"] + [f"reference_{n}" for n in every],
        "namespace": f"moec_{digest}",
        "element": kinds[0].element.value,
    }
    for name in _SHARED:
        found[name] = _render(f"{name}.j2", **shared)
    return found


def tensor_names(product: Product, side: str) -> tuple[str, ...]:
    """The tensors of the weights of a product, in the order of a kernel's arguments."""
    names = []
    for item in product.formats:
        names.append(f"{side}_{item.name}")
        names += [f"{side}_{item.name}_scales"] * item.packed
        names += [f"{side}_{item.name}_zeros"] * item.zero_points
        names += [f"{side}_{item.name}_shifts"] * item.two_levels
    return tuple(names)


def factor_names(kind: LayerKind) -> tuple[str, ...]:
    """The tensors of factored matrices that a kind of layer has, and of what turns choices into slots."""
    factors = kind.factors
    present = {
        "input_left": factors.input_rank,
        "input_right": factors.own_input,
        "input_latent": factors.latent,
        "output_left": factors.own_output,
        "output_right": factors.output_rank,
        "output_latent": factors.output_latent,
        "parts": kind.expanded,
        "shared_gates": kind.has_shared_gates,
    }
    return tuple(name for name, size in present.items() if size)


def _ranks(kind: LayerKind) -> dict[str, int]:
    return {"input": kind.factors.input_rank, "output": max(kind.factors.output_rank, kind.factors.output_latent)}


def _rank_block(kind: LayerKind, rank: int) -> int:
    """Columns that one step of a loop over a rank takes."""
    return max(WIDTH_UNIT, min(_power_of_two(rank), 32 if kind.element is Element.FLOAT32 else 64))


def route_operands(kind: LayerKind) -> tuple[str, ...]:
    """The vectors that the route of a kind of layer has."""
    return tuple(name for name in ROUTE_OPERANDS if getattr(kind.route_operands, name))


def _values(kind: LayerKind, name: str) -> dict[str, object]:
    routing = kind.routing
    outputs_padded = _power_of_two(kind.outputs)
    last_ranks = {Select.TOPK: routing.rank_offset + routing.k, Select.PER_GROUP_TOPK: routing.k}
    return {
        "kind": kind,
        "routing": routing,
        "name": name,
        "route_operands": route_operands(kind),
        "input_names": tensor_names(kind.gate_up, "input"),
        "output_names": tensor_names(kind.down, "output"),
        "decoders": _decoders(kind),
        "group_counts": _group_counts(kind),
        "outputs_padded": outputs_padded,
        "experts_padded": _power_of_two(kind.experts),
        "slots_padded": _power_of_two(kind.top_k),
        "groups_padded": _power_of_two(routing.groups),
        "ranks": last_ranks.get(routing.select, kind.outputs),
        "route_tokens": max(1, _ROUTE_BLOCK // outputs_padded) if outputs_padded < _ROUTE_BLOCK else 1,
        "entropy_is_shannon": abs(routing.entropy_q - 1.0) < _SHANNON,
        "table_columns": len(Column) if kind.factors != Factors() or len(kind.activations) > 1 else FIRST_COLUMNS,
        "column": {column.name.lower(): int(column) for column in Column},
        "bias_column": int(Column.BIAS_OFFSET),
        "factor_names": factor_names(kind),
        "rank_block": {side: _rank_block(kind, size) for side, size in _ranks(kind).items()},
        "expanded_padded": _power_of_two(kind.slots),
        "width_unit": WIDTH_UNIT,
        "plane_block": PLANE_BLOCK,
        "never": _NEVER,
        "lowest": _LOWEST,
        "taken": _TAKEN,
    }


def _decoders(kind: LayerKind) -> tuple[Decoder, ...]:
    """Codes in the fraction of 1 are exact numbers, and cheaper than a conversion."""
    fraction_bits, one = _ONES[kind.element]
    halves = kind.element.nbytes == 2
    found: dict[str, Decoder] = {}
    for item in (*kind.input_formats, *kind.output_formats):
        if item.planes == 1:
            continue
        name, place, mask = item.decoder(kind.element), fraction_bits - item.bits, item.unit - 1
        less = 0.0 if item.folded(kind.element) else item.zero_code
        first = f"{1 - less:g}" if less else "1"
        found[name] = Decoder(
            name,
            f"{first} + c / {item.unit} for the codes c from bit SHIFT on of both halves of words.",
            halves,
            place,
            f"0x{(mask << place) * 0x10001:08X}" if halves else f"{mask}",
            f"0x{one * 0x10001 if halves else one:08X}",
            less,
        )
    return tuple(found[name] for name in sorted(found))


def _group_counts(kind: LayerKind) -> tuple[int, ...]:
    """Into how many columns scales are taken apart, and the halves of these numbers."""
    most = max((item.parts for item in (*kind.input_formats, *kind.output_formats)), default=1)
    return tuple(count for count in (2, 4, 8) if count <= most)


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("moec.codegen.triton", "templates"),
        undefined=StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
    )
    environment.filters["quoted"] = _quoted
    environment.filters["imported"] = _imported
    return environment


def _quoted(value: object, before: int = 0) -> str:
    """A string or a tuple of strings as Python source, behind `before` characters of a line."""
    if isinstance(value, str):
        return '"' + value.encode("unicode_escape").decode().replace('"', '\\"') + '"'
    assert isinstance(value, tuple | list)
    items = [_quoted(item) for item in value]
    line = f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
    return line if before + len(line) <= _LINE else "(\n" + "".join(f"    {item},\n" for item in items) + ")"


def _imported(names: Sequence[str], before: int = 0) -> str:
    """Names to import, on one line where they fit behind `before` characters."""
    line = ", ".join(names)
    return line if before + len(line) <= _LINE else "(\n" + "".join(f"    {name},\n" for name in names) + ")"


def _render(template: str, **values: object) -> str:
    text = _environment().get_template(template).render(**values)
    # a macro that gives nothing leaves a line of spaces
    text = re.sub(r"^[ \t]+\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\n{4,}", "\n\n\n", text)
    if template == _KERNELS:
        # between macros; docstrings are indented less
        text = re.sub(r"\n\n+(?= {8})", "\n", text)
    return text.strip("\n") + "\n"
