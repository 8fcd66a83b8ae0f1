"""Emission of aten operations that move elements: views, permutations, slices, joins, gathers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from moec.codegen.onnx.context import Context, refuse, reshape_target, tensor_of
from moec.codegen.onnx.packed.product import named_packed, packed_rows
from moec.codegen.onnx.registry import cast_to, emits, normalized_axis, operand, result_type, self_type
from moec.dialects.aten import AtenOp
from moec.ir.dimensions import DimExpr
from moec.ir.types import DType

_INT64_MAX = (1 << 63) - 1


def reshaped(
    context: Context, value: ir.Value, source: Sequence[int | DimExpr], target: Sequence[int | DimExpr]
) -> ir.Value:
    """`value` of shape `source` read as `target`."""
    if tuple(source) == tuple(target):
        return value
    sizes = [context.size(size) for size in reshape_target(source, target)]
    return context.builder.reshape(value, sizes)


@emits("view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int")
@emits(
    "squeeze.default", "squeeze.dim", "squeeze.dims", "unsqueeze.default", "_reshape_copy.default", "view_copy.default"
)
def _reshape(context: Context, op: AtenOp) -> ir.Value:
    b, value = context.builder, context.value(op.tensor("self"))
    source, target = self_type(op).shape, result_type(op).shape
    if op.name == "aten.unsqueeze.default":
        return b.op("Unsqueeze", value, b.ints(normalized_axis(op.argument("dim"), len(target))))
    return reshaped(context, value, source, target)


@emits("permute.default", "transpose.int", "t.default", "numpy_T.default", "permute_copy.default")
def _permute(context: Context, op: AtenOp) -> ir.Value:
    return context.builder.op("Transpose", context.value(op.tensor("self")), perm=permutation(op))


def permutation(op: AtenOp) -> tuple[int, ...]:
    """The axes that `permute`, `transpose` and `t` put first to last."""
    rank = self_type(op).rank
    if op.name in ("aten.t.default", "aten.numpy_T.default"):
        return tuple(reversed(range(rank)))
    if op.name == "aten.transpose.int":
        axes = list(range(rank))
        first, second = (normalized_axis(op.argument(name), rank) for name in ("dim0", "dim1"))
        axes[first], axes[second] = second, first
        return tuple(axes)
    return tuple(normalized_axis(axis, rank) for axis in op.argument("dims"))


@emits("expand.default", "expand_as.default", "expand_copy.default", "broadcast_to.default")
def _expand(context: Context, op: AtenOp) -> ir.Value:
    source, target = self_type(op).shape, result_type(op).shape
    value = context.value(op.tensor("self"))
    if source == target:
        return value
    # a 1 keeps the source's size, so that sizes which do not change need no arithmetic at run time
    padded = (*[1] * (len(target) - len(source)), *source)
    sizes = [1 if old == new else new for old, new in zip(padded, target, strict=True)]
    return context.builder.op("Expand", value, context.shape(sizes))


@emits("slice.Tensor", "slice_copy.Tensor", "narrow.default")
def _slice(context: Context, op: AtenOp) -> ir.Value:
    axis = normalized_axis(op.argument("dim"), self_type(op).rank)
    size = self_type(op).shape[axis]
    if op.name == "aten.narrow.default":
        start, stop, step = op.argument("start"), op.argument("start") + op.argument("length"), 1
    else:
        start, stop, step = op.argument("start") or 0, op.argument("end"), op.argument("step")
    stop = _INT64_MAX if stop is None or stop == size else stop
    value = context.value(op.tensor("self"))
    if (start == 0 or start == -size) and step == 1 and (stop == _INT64_MAX or result_type(op).shape[axis] == size):
        return value
    b = context.builder
    return b.op("Slice", value, context.size_vector(start), context.size_vector(stop), b.ints(axis), b.ints(step))


@emits("select.int", "select_copy.int")
def _select(context: Context, op: AtenOp) -> ir.Value:
    axis = normalized_axis(op.argument("dim"), self_type(op).rank)
    index = context.scalar(op.argument("index"), DType.I64)
    return context.builder.op("Gather", context.value(op.tensor("self")), index, axis=axis)


@emits("cat.default")
def _concat(context: Context, op: AtenOp) -> ir.Value:
    kind = result_type(op)
    tensors = [value for value in op.tensors("tensors") if tensor_of(value).shape != (0,)]
    values = [cast_to(context, context.value(value), tensor_of(value).dtype, kind.dtype) for value in tensors]
    if len(values) == 1:
        return values[0]
    return context.builder.op("Concat", *values, axis=normalized_axis(op.argument("dim"), kind.rank))


@emits("stack.default")
def _stack(context: Context, op: AtenOp) -> ir.Value:
    b, axis = context.builder, normalized_axis(op.argument("dim"), result_type(op).rank)
    return b.op(
        "Concat", *[b.op("Unsqueeze", context.value(v), b.ints(axis)) for v in op.tensors("tensors")], axis=axis
    )


@emits(
    "split.Tensor", "split_with_sizes.default", "chunk.default", "split_with_sizes_copy.default", "split_copy.Tensor"
)
def _split(context: Context, op: AtenOp) -> tuple[ir.Value, ...]:
    axis = normalized_axis(op.argument("dim"), self_type(op).rank)
    sizes = [tensor_of(result).shape[axis] for result in op.results]
    value = context.value(op.tensor("self"))
    if len(sizes) == 1:
        return (value,)
    return context.builder.ops("Split", value, context.shape(sizes), outputs=len(sizes), axis=axis)


@emits("unbind.int")
def _unbind(context: Context, op: AtenOp) -> tuple[ir.Value, ...]:
    b, axis = context.builder, normalized_axis(op.argument("dim"), self_type(op).rank)
    value = context.value(op.tensor("self"))
    return tuple(b.op("Gather", value, b.integer(index), axis=axis) for index in range(len(op.results)))


@emits("repeat.default")
def _repeat(context: Context, op: AtenOp) -> ir.Value:
    b, repeats = context.builder, op.argument("repeats")
    value = context.value(op.tensor("self"))
    missing = len(repeats) - self_type(op).rank
    if missing:
        value = b.op("Unsqueeze", value, b.ints(*range(missing)))
    return b.op("Tile", value, context.shape(repeats))


@emits("arange.start_step", "arange.default", "arange.start")
def _arange(context: Context, op: AtenOp) -> ir.Value:
    kind = result_type(op)
    start = 0 if op.name == "aten.arange.default" else op.argument("start")
    step = op.argument("step") if op.name == "aten.arange.start_step" else 1
    end = op.argument("end")
    if all(isinstance(number, int) for number in (start, end, step)) and end - start <= 4096:
        array = np.arange(start, end, step)
        return context.builder.constant(array.astype(np.float32 if kind.dtype is DType.F32 else np.int64))
    limits = [context.scalar(number, kind.dtype) for number in (start, end, step)]
    return context.builder.op("Range", *limits)


@emits("gather.default")
def _gather(context: Context, op: AtenOp) -> ir.Value:
    axis = normalized_axis(op.argument("dim"), self_type(op).rank)
    return context.builder.op(
        "GatherElements", context.value(op.tensor("self")), context.value(op.tensor("index")), axis=axis
    )


@emits("index_select.default")
def _index_select(context: Context, op: AtenOp) -> ir.Value:
    axis = normalized_axis(op.argument("dim"), self_type(op).rank)
    return context.builder.op("Gather", context.value(op.tensor("self")), context.value(op.tensor("index")), axis=axis)


@emits("embedding.default")
def _embedding(context: Context, op: AtenOp) -> ir.Value:
    packed = named_packed(context, op.tensor("weight"))
    if packed is not None:
        return packed_rows(context, packed, context.value(op.tensor("indices")))
    return context.builder.op("Gather", context.value(op.tensor("weight")), context.value(op.tensor("indices")), axis=0)


@emits("index.Tensor")
def _index(context: Context, op: AtenOp) -> ir.Value:
    """`x[i, j, ...]` with index tensors for the first axes, which broadcast against each other, or for one axis."""
    b, value = context.builder, context.value(op.tensor("self"))
    positions = op.positioned_tensors("indices")
    indices = op.tensors("indices") or tuple(positions.values())
    if positions and len(positions) > 1:
        raise refuse(op, "indices for several axes of which some before them have none")
    if any(tensor_of(index).dtype is DType.I1 for index in indices):
        raise refuse(op, "a boolean mask selects a number of elements that depends on the data")
    if len(indices) == 1:
        return b.op("Gather", value, context.value(indices[0]), axis=next(iter(positions), 0))
    shape = _broadcast([tensor_of(index).shape for index in indices])
    parts = []
    for index in indices:
        expanded = context.value(index)
        if tensor_of(index).shape != shape:
            expanded = b.op("Expand", expanded, context.shape(shape))
        parts.append(b.op("Unsqueeze", expanded, b.ints(len(shape))))
    return b.op("GatherND", value, b.op("Concat", *parts, axis=len(shape)))


def _broadcast(shapes: Sequence[Sequence[int | DimExpr]]) -> tuple[int | DimExpr, ...]:
    rank = max(map(len, shapes))
    result: list[int | DimExpr] = [1] * rank
    for shape in shapes:
        for axis, size in enumerate(shape, rank - len(shape)):
            if size != 1:
                result[axis] = size
    return tuple(result)


@emits("scatter.src", "scatter.value", "scatter_add.default", "scatter_reduce.two")
def _scatter(context: Context, op: AtenOp) -> ir.Value:
    b, kind = context.builder, result_type(op)
    axis = normalized_axis(op.argument("dim"), kind.rank)
    index_type = tensor_of(op.tensor("index"))
    if op.tensors("src"):
        source = context.value(op.tensor("src"))
        if tensor_of(op.tensor("src")).shape != index_type.shape:
            ends = context.shape(index_type.shape)
            source = b.op("Slice", source, b.ints(*[0] * kind.rank), ends)
    else:
        source = b.op("Expand", operand(context, op, "value", kind.dtype), context.shape(index_type.shape))
    reduction = "add" if op.name == "aten.scatter_add.default" else None
    if op.name == "aten.scatter_reduce.two":
        reduction = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min"}.get(op.argument("reduce"))
        if reduction is None or not op.argument("include_self"):
            raise refuse(op, f"reduction {op.argument('reduce')}")
    data = context.value(op.tensor("self"))
    return b.op("ScatterElements", data, context.value(op.tensor("index")), source, axis=axis, reduction=reduction)


@emits("constant_pad_nd.default")
def _pad(context: Context, op: AtenOp) -> ir.Value:
    b, kind = context.builder, result_type(op)
    given = op.argument("pad")
    pairs = [(given[i], given[i + 1]) for i in range(0, len(given), 2)]
    pairs = [(0, 0)] * (kind.rank - len(pairs)) + pairs[::-1]
    pads = context.shape([before for before, _ in pairs] + [after for _, after in pairs])
    return b.op("Pad", context.value(op.tensor("self")), pads, operand(context, op, "value", kind.dtype))


@emits("one_hot.default")
def _one_hot(context: Context, op: AtenOp) -> ir.Value:
    b = context.builder
    depth = context.scalar(op.argument("num_classes"), DType.I64)
    return b.op("OneHot", context.value(op.tensor("self")), depth, b.ints(0, 1))


@emits("tril.default", "triu.default")
def _triangle(context: Context, op: AtenOp) -> ir.Value:
    b, kind = context.builder, self_type(op)
    value = cast_to(
        context, context.value(op.tensor("self")), kind.dtype, DType.I32 if kind.dtype is DType.I1 else kind.dtype
    )
    diagonal = context.scalar(op.argument("diagonal"), DType.I64)
    result = b.op("Trilu", value, diagonal, upper=int(op.name == "aten.triu.default"))
    return b.cast(result, DType.I1) if kind.dtype is DType.I1 else result


@emits("roll.default")
def _roll(context: Context, op: AtenOp) -> ir.Value:
    b, value = context.builder, context.value(op.tensor("self"))
    if len(op.argument("shifts")) != len(op.argument("dims")):
        raise refuse(op, "a roll of the flattened tensor")
    for shift, dim in zip(op.argument("shifts"), op.argument("dims"), strict=True):
        axis = normalized_axis(dim, self_type(op).rank)
        tail = b.op("Slice", value, b.ints(-shift), b.ints(_INT64_MAX), b.ints(axis))
        head = b.op("Slice", value, b.ints(0), b.ints(-shift), b.ints(axis))
        value = b.op("Concat", tail, head, axis=axis)
    return value


@emits("flip.default")
def _flip(context: Context, op: AtenOp) -> ir.Value:
    b = context.builder
    axes = [normalized_axis(axis, self_type(op).rank) for axis in op.argument("dims")]
    count = len(axes)
    starts, ends, steps = b.ints(*[-1] * count), b.ints(*[-_INT64_MAX] * count), b.ints(*[-1] * count)
    return b.op("Slice", context.value(op.tensor("self")), starts, ends, b.ints(*axes), steps)
