"""What the experts of a layer are, read from the bodies of their classes, and what calibration saw of them."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifact.format_facts import packed_facts
from moec.artifact.ledger import round_error
from moec.artifact.report import ExpertClassFacts, ExpertUse
from moec.dialects.builtin import WeightOp
from moec.dialects.moe import ExpertClass, ExpertsOp
from moec.dialects.quant import DequantOp
from moec.ir import Operation, Region, TensorType, Value
from moec.weights.expression_parser import parse_expression
from moec.weights.uses import without_cast

if TYPE_CHECKING:
    from moec.module import Module

_ACTIVATIONS = {"silu": "SiLU", "gelu": "GELU", "relu": "ReLU", "sigmoid": "sigmoid", "tanh": "tanh"}
_GATED = {"SiLU": "SwiGLU", "GELU": "GeGLU", "ReLU": "ReGLU"}
_PRODUCTS = ("aten.linear.", "aten.mm.", "aten.matmul.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.")


@dataclass(frozen=True)
class BodyFacts:
    """The kind of an expert in words, its hidden width (0 if it has no hidden activations), and its largest rank (0 if
    no matrix is factored)."""

    kind: str
    width: int
    rank: int


def class_facts(module: Module, experts: ExpertsOp) -> Iterator[ExpertClassFacts]:
    """The classes of a layer, in order."""
    for group, weights, region in experts.class_operands():
        facts = body_facts(region, group)
        own = sum(_weight_bytes(module, weight) for weight in weights[: group.stacks])
        each = [1 if position >= group.stacks else len(group.experts) for position in range(len(weights))]
        sizes = [_weight_bytes(module, weight) // count for weight, count in zip(weights, each, strict=True)]
        arguments = region.block.arguments[1:]
        whole = frozenset(arguments[group.stacks :])
        formats, bits = packed_facts(region, dict(zip(arguments, sizes, strict=True)), whole)
        yield ExpertClassFacts(
            experts=group.experts,
            width=facts.width,
            rank=facts.rank,
            body=f"{facts.kind} in {formats}, {bits:.2f} bits" if formats else facts.kind,
            bytes_per_expert=own // len(group.experts),
            shared_bytes=sum(_weight_bytes(module, weight) for weight in weights[group.stacks :]),
        )


def expert_use(module: Module, experts: ExpertsOp) -> ExpertUse | None:
    """What the calibration of a module says of a layer as it is now; None where it was not calibrated."""
    from moec.errors import MoecError
    from moec.experts import find_moe_layers

    if module.calibration is None:
        return None
    layer = next((found for found in find_moe_layers(module.op) if found.experts is experts), None)
    if layer is None:
        return None
    try:
        statistics = module.calibration.statistics(layer)
    except MoecError:
        # a layer that came into being later
        return None
    return ExpertUse(
        tokens=statistics.tokens,
        chosen=tuple(int(count) for count in statistics.count),
        gate_mass=tuple(round_error(float(mass)) for mass in statistics.gate_mass),
    )


def body_facts(region: Region, group: ExpertClass) -> BodyFacts:
    """What the body of a class computes, such as `SwiGLU` or `low-rank SwiGLU`."""
    ranks = _ranks(region)
    width = inner_width(region)
    rank = max((rank for _, rank in ranks), default=0)
    if not any(_is_product(op) for op in region.block):
        return BodyFacts("constant" if _spreads_a_weight(region) else "elementwise", 0, 0)
    if not width:
        return BodyFacts("affine" if ranks else "linear", 0, rank)
    activation = describe_body(region)
    shared: set[Value] = set(region.block.arguments[1 + group.stacks :])
    if not ranks:
        based = any(_reads_whole(op, shared) for op in region.block if _is_product(op))
        return BodyFacts(f"{activation} on a shared base" if based else activation, width, 0)
    in_factors = {operand for op, _ in ranks for product in _both(op) for operand in product.operands}
    if shared & in_factors:
        return BodyFacts(f"latent {activation}", width, rank)
    return BodyFacts(f"{activation} on a shared base" if shared else f"low-rank {activation}", width, rank)


def describe_body(region: Region) -> str:
    """The kind of feed-forward block that a region computes, such as `SwiGLU`."""
    names = [op.name.removeprefix("aten.").split(".")[0] for op in region.block]
    activation = next((_ACTIVATIONS[name] for name in names if name in _ACTIVATIONS), "linear")
    if "mul" not in names:
        return activation
    return _GATED.get(activation, f"gated {activation}")


def inner_width(region: Region) -> int:
    """The number of hidden activations: columns of what the last matrix reads, whole or in factors; 0 if there are
    none between the tokens and the result."""
    tokens = region.block.arguments[0]
    for op in reversed(region.block):
        if not _is_product(op):
            continue
        rows = _rows(op)
        while rows is not None and (inner := _product_behind(rows)) is not None:
            rows = _rows(inner)
        if rows is None or rows is tokens:
            return 0
        columns = _shape(rows)[-1]
        return columns if isinstance(columns, int) else 0
    return 0


def _ranks(region: Region) -> list[tuple[Operation, int]]:
    """Products whose rows are a product themselves, and how many columns lie between."""
    found = []
    for op in region.block:
        rows = _rows(op) if _is_product(op) else None
        if rows is not None and _product_behind(rows) is not None:
            columns = _shape(rows)[-1]
            found.append((op, columns if isinstance(columns, int) else 0))
    return found


def _both(op: Operation) -> tuple[Operation, ...]:
    """A product and the one that makes its rows."""
    rows = _rows(op)
    inner = None if rows is None else _product_behind(rows)
    return (op,) if inner is None else (op, inner)


def _reads_whole(op: Operation, shared: Set[Value]) -> bool:
    """Whether the weight of a product is one of `shared`, or packed in nothing else."""
    for value in op.operands:
        inner = value.defining_op
        if value in shared or (isinstance(inner, DequantOp) and set(inner.operands) <= shared):
            return True
    return False


def _product_behind(value: Value) -> Operation | None:
    op = value.defining_op
    return op if op is not None and _is_product(op) else None


def _is_product(op: Operation) -> bool:
    return op.name.startswith(_PRODUCTS)


def _rows(op: Operation) -> Value | None:
    """The operand of a product that has a row per token."""
    return next(
        (value for value in op.operands if len(_shape(value)) >= 2 and not isinstance(_shape(value)[-2], int)), None
    )


def _spreads_a_weight(region: Region) -> bool:
    return any(op.name == "aten.expand.default" for op in region.block)


def _weight_bytes(module: Module, value: Value) -> int:
    """Bytes of a weight in the element type that it is stored in."""
    op = value.defining_op
    if not isinstance(op, WeightOp) or not isinstance(value.type, TensorType):
        return 0
    dtype = module.weights.shape_dtype(without_cast(parse_expression(op.source)))[1]
    count = 1
    for size in value.type.static_shape:
        count *= size
    return count * dtype.itemsize


def _shape(value: Value) -> tuple[object, ...]:
    return tuple(value.type.shape) if isinstance(value.type, TensorType) else ()
