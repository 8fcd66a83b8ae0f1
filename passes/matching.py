"""Questions that patterns ask about values: which operation made it, which number it is, which part of what."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from moec.dialects.aten import AtenOp
from moec.dialects.builtin import ConstantOp
from moec.ir import DimExpr, DType, OpResult, TensorType, Value

_VIEWS = ("view.default", "reshape.default", "_unsafe_view.default")
_SCALAR_FORMATS = {DType.F64: "<d", DType.F32: "<f", DType.F16: "<e", DType.I64: "<q", DType.I32: "<i", DType.I1: "<?"}


def tensor(value: Value) -> TensorType:
    """The tensor type of a value; every value that patterns look at has one."""
    kind = value.type
    assert isinstance(kind, TensorType)
    return kind


def shape(value: Value) -> tuple[int | DimExpr, ...]:
    """The sizes of a value."""
    return tensor(value).shape


def made_by(value: Value, *names: str) -> AtenOp | None:
    """The aten operation that gives `value`, if its name without `aten.` is one of `names`."""
    op = value.defining_op
    if isinstance(op, AtenOp) and op.name.removeprefix("aten.") in names:
        return op
    return None


def axis(op: AtenOp, name: str = "dim") -> int:
    """A non-negative axis of the first operand."""
    number = op.argument(name)
    assert isinstance(number, int)
    return number % max(tensor(op.operands[0]).rank, 1)


def is_last_axis(op: AtenOp, name: str = "dim") -> bool:
    """Whether `op` works along the last axis of its first operand alone."""
    given = op.argument(name)
    axes = given if isinstance(given, tuple) else (given,)
    last = tensor(op.operands[0]).rank - 1
    return len(axes) == 1 and isinstance(axes[0], int) and axes[0] in (-1, last)


def number(value: Value) -> float | None:
    """The number that a zero-dimensional constant holds, else None."""
    op = value.defining_op
    if isinstance(op, ConstantOp):
        kind = tensor(value)
        if kind.element_count == 1 and kind.dtype in _SCALAR_FORMATS:
            return float(struct.unpack(_SCALAR_FORMATS[kind.dtype], op.data.data)[0])
        return None
    made = made_by(value, "scalar_tensor.default")
    if made is not None:
        return float(made.argument("s"))
    made = made_by(value, "full.default")
    if made is not None and math.prod(made.argument("size")) == 1:
        return float(made.argument("fill_value"))
    return None


def added_number(value: Value) -> tuple[Value, float] | None:
    """(x, c) where `value` is x + c."""
    op = made_by(value, "add.Scalar", "sub.Scalar")
    if op is not None:
        sign = -1.0 if op.name == "aten.sub.Scalar" else 1.0
        return op.tensor("self"), sign * float(op.argument("other")) * float(op.argument("alpha"))
    op = made_by(value, "add.Tensor")
    if op is not None and op.argument("alpha") == 1:
        for one, other in both_orders(op):
            constant = number(other)
            if constant is not None:
                return one, constant
    return None


def scaled_by_number(value: Value) -> tuple[Value, float] | None:
    """(x, c) where `value` is x * c."""
    op = made_by(value, "mul.Scalar", "div.Scalar")
    if op is not None:
        factor = float(op.argument("other"))
        return op.tensor("self"), factor if op.name == "aten.mul.Scalar" else 1.0 / factor
    op = made_by(value, "mul.Tensor")
    if op is not None:
        for one, other in both_orders(op):
            constant = number(other)
            if constant is not None and tensor(one) == tensor(value):
                return one, constant
    op = made_by(value, "div.Tensor")
    if op is not None:
        constant = number(op.tensor("other"))
        if constant is not None:
            return op.tensor("self"), 1.0 / constant
    return None


def both_orders(op: AtenOp) -> Iterator[tuple[Value, Value]]:
    """(self, other) and (other, self) of a commutative operation."""
    one, other = op.tensor("self"), op.tensor("other")
    yield one, other
    if one is not other:
        yield other, one


def same(one: Value, other: Value, depth: int = 4) -> bool:
    """Whether two values are equal by construction: one value, or the same pure operation on such ones."""
    if one is other:
        return True
    if not isinstance(one, OpResult) or not isinstance(other, OpResult) or depth == 0 or one.index != other.index:
        return False
    left, right = one.owner, other.owner
    alike = left.name == right.name and left.pure and not left.regions and left.attributes == right.attributes
    if not alike or one.type != other.type or left.operand_count != right.operand_count:
        return False
    return all(same(a, b, depth - 1) for a, b in zip(left.operands, right.operands, strict=True))


def is_view(value: Value) -> AtenOp | None:
    """The view or reshape that gives `value`."""
    return made_by(value, *_VIEWS)


@dataclass(frozen=True)
class Part:
    """Channels start, start + step, ... (`count` of them) of the last axis of `base` seen with the shape `sizes`."""

    base: Value
    sizes: tuple[int | DimExpr, ...]
    start: int
    count: int
    step: int = 1


def part(value: Value) -> Part | None:
    """What `value` takes from the last axis of another one, by slice, split, chunk, or select from pairs."""
    op = value.defining_op
    if not isinstance(op, AtenOp) or not isinstance(value, OpResult):
        return None
    name = op.name.removeprefix("aten.")
    if name == "slice.Tensor" and is_last_axis(op):
        base = op.tensor("self")
        size, count = shape(base)[-1], shape(value)[-1]
        if isinstance(size, int) and isinstance(count, int):
            start = op.argument("start") or 0
            return Part(base, shape(base), start + size if start < 0 else start, count, op.argument("step"))
    if name in ("split_with_sizes.default", "split.Tensor", "chunk.default") and is_last_axis(op):
        before = [shape(result)[-1] for result in op.results[: value.index]]
        count = shape(value)[-1]
        sizes = [size for size in before if isinstance(size, int)]
        if isinstance(count, int) and len(sizes) == len(before):
            return Part(op.tensor("self"), shape(op.tensor("self")), sum(sizes), count)
    return _one_of_pairs(value, op, name)


def _one_of_pairs(value: OpResult, op: AtenOp, name: str) -> Part | None:
    """view(x, [..., R / 2, 2])[..., i] is view(x, [..., R])[..., i::2]."""
    if name == "select.int" and is_last_axis(op):
        index = op.argument("index")
    elif name == "unbind.int" and is_last_axis(op):
        index = value.index
    else:
        return None
    pairs = op.tensor("self")
    view = is_view(pairs)
    if view is None or shape(pairs)[-1] != 2:
        return None
    count = shape(value)[-1]
    if not isinstance(count, int):
        return None
    return Part(view.operands[0], (*shape(pairs)[:-2], 2 * count), index % 2, count, 2)


def channel_vector(value: Value, of: Value) -> Value | None:
    """`value` as one number per channel of `of`, of its element type; leading axes of size 1 are looked through."""
    channels = shape(of)[-1]
    while (view := is_view(value) or made_by(value, "unsqueeze.default")) is not None:
        if shape(value)[-1:] != (channels,) or any(size != 1 for size in shape(value)[:-1]):
            return None
        if shape(view.operands[0])[-1:] != (channels,):
            return None
        value = view.operands[0]
    fits = shape(value) == (channels,) and tensor(value).dtype is tensor(of).dtype
    return value if fits else None
