"""Canonical forms of aten operations.

Values of the IR have no strides, so `view` and `reshape` are one thing, and copies are nothing. Numbers are compared
exactly: `x * 1`, `x / 1` and `x - 0` are `x` for every float, but `x + 0` turns -0.0 into 0.0 and stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moec.dialects import aten
from moec.dialects.aten import AtenOp
from moec.ir.dimensions import DimExpr
from moec.ir.operation import Operation, Value
from moec.ir.types import DType, TensorType
from moec.rewrite.pattern import Rewriter, rewrite

_COPIES = ("clone.default", "contiguous.default", "alias.default", "detach.default", "lift_fresh.default",
           "lift_fresh_copy.default")  # fmt: skip
_RESHAPES = ("view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int")
_UNIT_AXES = ("unsqueeze.default", "squeeze.default", "squeeze.dim", "squeeze.dims")
_CASTS = ("_to_copy.default", "to.dtype", "to.dtype_layout", "type_as.default")
_TRANSPOSES = ("permute.default", "transpose.int", "t.default")
_INVOLUTIONS = ("neg.default", "logical_not.default", "bitwise_not.default")
# Each gives its operand where the type stays the same, because its result is determined by it.
_SHAPES = (*_RESHAPES, *_UNIT_AXES, "expand.default", "expand_as.default", "view_as.default", "reshape_as.default")

# (from, to) such that every value survives
_WIDENINGS = frozenset(
    {
        *((DType.I1, kind) for kind in DType if kind is not DType.I1 and kind is not DType.C64),
        *((DType.F16, kind) for kind in (DType.F32, DType.F64)),
        *((DType.BF16, kind) for kind in (DType.F32, DType.F64)),
        *((DType.F8E4M3FN, kind) for kind in (DType.F16, DType.BF16, DType.F32, DType.F64)),
        *((DType.F8E5M2, kind) for kind in (DType.F16, DType.BF16, DType.F32, DType.F64)),
        (DType.F32, DType.F64),
        (DType.I8, DType.I16), (DType.I8, DType.I32), (DType.I8, DType.I64),
        (DType.U8, DType.I16), (DType.U8, DType.I32), (DType.U8, DType.I64),
        (DType.I16, DType.I32), (DType.I16, DType.I64), (DType.I32, DType.I64),
    }
)  # fmt: skip


def _names(*groups: Sequence[str]) -> list[str]:
    return [f"aten.{name}" for group in groups for name in group]


def _first(op: Operation) -> Value:
    return op.operands[0]


def _kind(value: Value) -> TensorType:
    kind = value.type
    assert isinstance(kind, TensorType)  # the verifier of AtenOp saw to it
    return kind


def _definer(value: Value, names: Sequence[str]) -> AtenOp | None:
    """The operation that makes `value`, if it is one of `names`."""
    op = value.defining_op
    return op if isinstance(op, AtenOp) and op.name in names else None


def _replace_by_new(op: AtenOp, rewriter: Rewriter, name: str, source: Value, **arguments: Any) -> bool:
    new = aten.build(name, {"self": source}, (op.results[0].type,), op.location, **arguments)
    rewriter.replace_with(op, new)
    return True


@rewrite(*_names(_COPIES))
def drop_copy(op: AtenOp, rewriter: Rewriter) -> bool:
    """clone(x), contiguous(x), detach(x) ==> x"""
    if _first(op).type != op.result.type:
        return rewriter.refuse(op, "the copy changes the type")
    rewriter.replace(op, _first(op))
    return True


@rewrite("aten.dropout.default", "aten.native_dropout.default", "aten.feature_dropout.default")
def drop_evaluation_dropout(op: AtenOp, rewriter: Rewriter) -> bool:
    """dropout(x, train=false) ==> x"""
    if op.argument("train") is not False:
        return rewriter.refuse(op, "it is dropout of training")
    if len(op.results) == 2 and op.results[1].uses:
        return rewriter.refuse(op, "its mask is used")
    op.results[0].replace_all_uses_with(_first(op))
    rewriter.erase(op)
    return True


@rewrite(*_names(_SHAPES, _CASTS))
def drop_unchanged_shape(op: AtenOp, rewriter: Rewriter) -> bool:
    """view(x), expand(x), squeeze(x), to(x) of the same type ==> x"""
    if _first(op).type != op.result.type:
        return False
    rewriter.replace(op, _first(op))
    return True


@rewrite("aten.slice.Tensor")
def drop_whole_slice(op: AtenOp, rewriter: Rewriter) -> bool:
    """slice(x) of all elements ==> x"""
    # as many elements as before, taken in ascending order, are all of them
    if _first(op).type != op.result.type:
        return False
    rewriter.replace(op, _first(op))
    return True


@rewrite("aten.cat.default")
def drop_single_cat(op: AtenOp, rewriter: Rewriter) -> bool:
    """cat(x) ==> x"""
    if op.operand_count != 1:
        return False
    rewriter.replace(op, _first(op))
    return True


@rewrite("aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default")
def drop_single_split(op: AtenOp, rewriter: Rewriter) -> bool:
    """split(x) into one piece ==> x"""
    if len(op.results) != 1 or op.results[0].type != _first(op).type:
        return False
    rewriter.replace(op, _first(op))
    return True


@rewrite("aten.constant_pad_nd.default", "aten.repeat.default")
def drop_empty_padding(op: AtenOp, rewriter: Rewriter) -> bool:
    """pad(x) by nothing, repeat(x) once ==> x"""
    neutral = 0 if op.name == "aten.constant_pad_nd.default" else 1
    counts = op.argument("pad" if neutral == 0 else "repeats")
    if any(count != neutral for count in counts) or _first(op).type != op.result.type:
        return False
    rewriter.replace(op, _first(op))
    return True


@rewrite("aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Tensor", "aten.div.Scalar", "aten.sub.Tensor",
         "aten.sub.Scalar", "aten.add.Tensor", "aten.add.Scalar", "aten.pow.Tensor_Scalar")  # fmt: skip
def drop_neutral_operand(op: AtenOp, rewriter: Rewriter) -> bool:
    """x * 1, x / 1, x - 0, x ** 1 ==> x; x + 0 of integers ==> x"""
    kind = op.name.split(".")[1]
    number = op.attributes.get("exponent" if kind == "pow" else "other")
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    if number != (0 if kind in ("add", "sub") else 1) or _first(op).type != op.result.type:
        return False
    if kind == "sub" and math.copysign(1, number) < 0:
        return rewriter.refuse(op, "x - -0.0 is not x where x is -0.0")
    if kind == "add" and not _kind(op.result).dtype.is_integer:
        return rewriter.refuse(op, "x + 0 is not x where x is -0.0")
    rewriter.replace(op, _first(op))
    return True


@rewrite(*_names(_INVOLUTIONS))
def drop_double_negation(op: AtenOp, rewriter: Rewriter) -> bool:
    """neg(neg(x)) ==> x"""
    inner = _definer(_first(op), [op.name])
    if inner is None or _first(inner).type != op.result.type:
        return False
    rewriter.replace(op, _first(inner))
    return True


@rewrite(*_names(_RESHAPES, _UNIT_AXES))
def merge_reshapes(op: AtenOp, rewriter: Rewriter) -> bool:
    """view(view(x)) ==> reshape(x)"""
    inner = _definer(_first(op), _names(_RESHAPES, _UNIT_AXES))
    if inner is None:
        return False
    source = _first(inner)
    if source.type == op.result.type:
        rewriter.replace(op, source)
        return True
    if op.name in _names(_UNIT_AXES) and inner.name in _names(_UNIT_AXES):
        return False  # two unit axes say more than one reshape with symbolic sizes
    return _replace_by_new(op, rewriter, "reshape.default", source, shape=_kind(op.result).shape)


@rewrite("aten.expand.default")
def merge_expands(op: AtenOp, rewriter: Rewriter) -> bool:
    """expand(expand(x)) ==> expand(x)"""
    inner = _definer(_first(op), ["aten.expand.default"])
    if inner is None:
        return False
    return _replace_by_new(op, rewriter, "expand.default", _first(inner), size=_kind(op.result).shape)


@rewrite(*_names(_CASTS))
def merge_casts(op: AtenOp, rewriter: Rewriter) -> bool:
    """to(to(x, wider), d) ==> to(x, d)"""
    inner = _definer(_first(op), _names(_CASTS))
    if inner is None:
        return False
    source, through, target = _kind(_first(inner)), _kind(inner.result), _kind(op.result)
    if (source.dtype, through.dtype) not in _WIDENINGS:
        return rewriter.refuse(op, f"{source.dtype.value} does not survive {through.dtype.value}")
    if source == target:
        rewriter.replace(op, _first(inner))
        return True
    return _replace_by_new(op, rewriter, "_to_copy.default", _first(inner), dtype=target.dtype)


@rewrite(*_names(_TRANSPOSES))
def merge_permutations(op: AtenOp, rewriter: Rewriter) -> bool:
    """permute(permute(x, a), b) ==> permute(x, a after b), or x"""
    order = _permutation(op)
    source = _first(op)
    if order != sorted(order):
        inner = _definer(source, _names(_TRANSPOSES))
        if inner is None:
            return False
        inner_order = _permutation(inner)
        source = _first(inner)
        order = [inner_order[axis] for axis in order]
    if order == sorted(order):
        rewriter.replace(op, source)
        return True
    moved = [axis for axis, origin in enumerate(order) if axis != origin]
    if len(moved) == 2:
        return _replace_by_new(op, rewriter, "transpose.int", source, dim0=moved[0], dim1=moved[1])
    return _replace_by_new(op, rewriter, "permute.default", source, dims=tuple(order))


def _permutation(op: AtenOp) -> list[int]:
    """Which axis of the operand stands at each axis of the result."""
    rank = _kind(op.result).rank
    if op.name == "aten.permute.default":
        return [axis % rank for axis in op.argument("dims")]
    order = list(range(rank))
    if rank > 1:
        first, second = (0, 1) if op.name == "aten.t.default" else (op.argument("dim0"), op.argument("dim1"))
        order[first], order[second] = order[second], order[first]
    return order


@rewrite("aten.slice.Tensor")
def merge_slices(op: AtenOp, rewriter: Rewriter) -> bool:
    """slice(slice(x, a), b) along one axis ==> slice(x, a + b)"""
    inner = _definer(_first(op), ["aten.slice.Tensor"])
    if inner is None:
        return False
    outer_range, inner_range = _static_range(op), _static_range(inner)
    if outer_range is None or inner_range is None or outer_range[0] != inner_range[0]:
        return False
    axis, start, step, count = outer_range
    _, inner_start, inner_step, _ = inner_range
    begin = inner_start + start * inner_step
    stride = step * inner_step
    # one past the last element that is taken
    end = begin + (count - 1) * stride + 1 if count else begin
    return _replace_by_new(op, rewriter, "slice.Tensor", _first(inner), dim=axis, start=begin, end=end, step=stride)


def _static_range(op: AtenOp) -> tuple[int, int, int, int] | None:
    """(axis, start, step, count) of a slice in numbers; None where a size is symbolic."""
    axis = op.argument("dim") % _kind(op.result).rank
    size, count = _kind(_first(op)).shape[axis], _kind(op.result).shape[axis]
    start, step = op.argument("start"), op.argument("step")
    if any(isinstance(item, DimExpr) for item in (size, count, start, step)):
        return None
    assert isinstance(size, int) and isinstance(count, int)
    start = 0 if start is None else start
    start = min(max(start + size if start < 0 else start, 0), size)
    return axis, start, step, count


PATTERNS = (
    drop_copy,
    drop_evaluation_dropout,
    drop_unchanged_shape,
    drop_whole_slice,
    drop_single_cat,
    drop_single_split,
    drop_empty_padding,
    drop_neutral_operand,
    drop_double_negation,
    merge_reshapes,
    merge_expands,
    merge_casts,
    merge_permutations,
    merge_slices,
)
