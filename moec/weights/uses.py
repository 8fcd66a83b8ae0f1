"""Which weights a module holds, each counted once, and how much of them one token uses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from moec.dialects.builtin import WeightOp
from moec.dialects.moe import ExpertClass, ExpertsOp
from moec.dialects.nn import MLPOp
from moec.dialects.quant import DequantOp
from moec.ir import Operation, Region, TensorType, Value
from moec.weights.expression import Cast, Expression, Slice
from moec.weights.expression_parser import parse_expression
from moec.weights.rows import joined_parts, row_of, simplified

if TYPE_CHECKING:
    from moec.module import Module


@dataclass(frozen=True)
class WeightUse:
    """One distinct weight; of a stack of experts, that of one expert.

    `op` is the first operation that names it, `expression` what it is, without casts. `elements` and `bytes` are those
    of the weight as it is stored; what is joined of several tensors counts as those. The codes of a packed matrix have
    its elements, its scales and tables have none. One token reads the share `read`
    of it on average, if the router prefers no expert, and multiplies it `products` times (0 for what is only added,
    scaled or looked up).
    """

    op: WeightOp
    expression: Expression
    elements: int
    bytes: int
    read: float
    products: float


def weight_uses(module: Module) -> tuple[WeightUse, ...]:
    """Every distinct weight of a module, in the order of first mention.

    Experts that several layers, router outputs or stacks name are one weight, as they are in an artifact.
    """
    found: dict[Expression, WeightUse] = {}
    for op in module.op.walk():
        if isinstance(op, WeightOp) and op.value.uses:
            for use in _uses_of(module, op):
                known = found.get(use.expression)
                found[use.expression] = use if known is None else _together(known, use)
    for key in list(found):
        if isinstance(key, Slice) and key.operand in found:
            # a part of what is there as a whole, which is not stored again
            found[key.operand] = _together(found[key.operand], found.pop(key))
    return tuple(found.values())


def without_cast(expression: Expression) -> Expression:
    """What is stored; the IR computes in float32 through a cast."""
    while isinstance(expression, Cast):
        expression = expression.operand
    return expression


def _together(known: WeightUse, again: WeightUse) -> WeightUse:
    share = again.elements / max(known.elements, 1)
    read, products = min(known.read + share * again.read, 1.0), known.products + share * again.products
    return WeightUse(known.op, known.expression, known.elements, known.bytes, read, products)


def _uses_of(module: Module, op: WeightOp) -> Iterator[WeightUse]:
    whole = without_cast(parse_expression(op.source))
    shape = _shape(op.value)
    assert isinstance(op.value.type, TensorType)
    # what is kept in float64 for exact comparisons is written in the type of the module
    itemsize = min(module.weights.shape_dtype(whole)[1].itemsize, op.value.type.dtype.bytes)
    elements = math.prod(shape)
    density = _density(op)
    stacked: ExpertsOp | None = None
    read = products = 0.0
    for user in dict.fromkeys(op.value.users):
        if not isinstance(user, ExpertsOp):
            read = 1.0
            readers = user.results[0].users if isinstance(user, DequantOp) else [user]
            if len(shape) >= 2 or density > 1:
                products += sum(not reader.name.startswith("aten.embedding.") for reader in readers)
            continue
        for group, weights, region in user.class_operands():
            if op.value in weights[: group.stacks]:
                stacked = user
            shared = region.block.arguments[1 + group.stacks :]
            for value, argument in zip(weights[group.stacks :], shared, strict=True):
                if value is op.value:
                    slots = sum(_slots(user, expert) for expert in group.experts)
                    read = max(read, min(slots, 1.0))
                    if len(shape) >= 2:
                        products += min(slots, 1.0) if _reads_tokens_only(region, argument) else slots
    if stacked is None:
        yield WeightUse(op, whole, round(elements * density), elements * itemsize, read, products)
        return
    for row, slots in enumerate(_slots_by_row(op)):
        parts = joined_parts(simplified(row_of(whole, row, module.weights), module.weights))
        multiplied = slots if len(shape) >= 3 or density > 1 else 0.0
        for part in parts:
            each = elements // shape[0] if len(parts) == 1 else math.prod(module.weights.shape_dtype(part)[0])
            yield WeightUse(op, part, round(each * density), each * itemsize, min(slots, 1.0), multiplied)


def _density(op: WeightOp) -> Fraction:
    """Weights per stored element: 1, or those of a packed matrix for its codes and 0 for its other parts."""
    for value in _names_of(op.value):
        for user in value.users:
            if isinstance(user, DequantOp):
                stands_for = math.prod(_shape(user.weight)) if user.codes is value else 0
                return Fraction(stands_for, math.prod(_shape(value)))
    return Fraction(1)


def _names_of(value: Value) -> Iterator[Value]:
    """A weight, and what the bodies that read it call it."""
    yield value
    for user in value.users:
        bodies: list[tuple[Sequence[Value], Region]] = []
        if isinstance(user, ExpertsOp):
            bodies += [(weights, region) for _, weights, region in user.class_operands()]
        elif isinstance(user, MLPOp):
            bodies.append((user.weights, user.regions[0]))
        for weights, region in bodies:
            arguments = zip(weights, region.block.arguments[1:], strict=True)
            yield from (argument for weight, argument in arguments if weight is value)


def _slots_by_row(op: WeightOp) -> list[float]:
    """For each row of a stack, how many slots of a token it serves on average, over all layers that read it."""
    rows = [0.0] * _shape(op.value)[0]
    for user in dict.fromkeys(op.value.users):
        if isinstance(user, ExpertsOp):
            for group in _classes_that_stack(user, op.value):
                for row, expert in enumerate(group.experts):
                    rows[row] += _slots(user, expert)
    return rows


def _classes_that_stack(experts: ExpertsOp, value: Value) -> Iterator[ExpertClass]:
    for group, weights, _ in experts.class_operands():
        if value in weights[: group.stacks]:
            yield group


def _slots(experts: ExpertsOp, expert: int) -> float:
    """The share of tokens that come to a stored expert, if the router prefers none of its outputs."""
    outputs = len(experts.stored)
    return slots_per_token(experts) * experts.stored.count(expert) / outputs if outputs else 0.0


def slots_per_token(experts: ExpertsOp) -> int:
    """The static number of slots per token: the most experts that a token can have."""
    kind = experts.ids.type
    slots = kind.shape[1] if isinstance(kind, TensorType) else None
    return slots if isinstance(slots, int) else len(experts.stored)


def _reads_tokens_only(region: Region, weight: Value) -> bool:
    """Whether a weight multiplies the tokens themselves, so that once per token is enough for all experts."""
    rows = region.block.arguments[0]
    return all(rows in user.operands and _is_product(user) for user in weight.users)


def _is_product(op: Operation) -> bool:
    return op.name in ("aten.linear.default", "aten.mm.default", "aten.matmul.default")


def _shape(value: Value) -> tuple[int, ...]:
    kind = value.type
    assert isinstance(kind, TensorType)
    return kind.static_shape
