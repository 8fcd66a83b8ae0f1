"""Emission of aten reductions, sorts, softmax and normalisations."""

from __future__ import annotations

import onnx_ir as ir

from moec.codegen.onnx.context import Context, refuse
from moec.codegen.onnx.registry import axes_of, emits, normalized_axis, operand, result_type, self_type
from moec.dialects.aten import AtenOp
from moec.ir.types import DType

_REDUCTIONS = {
    "mean": "ReduceMean",
    "sum": "ReduceSum",
    "amax": "ReduceMax",
    "amin": "ReduceMin",
    "logsumexp": "ReduceLogSumExp",
    "prod": "ReduceProd",
}


@emits(
    "mean.dim", "mean.default", "sum.dim_IntList", "sum.default", "amax.default", "amin.default", "logsumexp.default"
)
@emits("prod.dim_int", "prod.default")
def _reduce(context: Context, op: AtenOp) -> ir.Value:
    dtype = result_type(op).dtype
    has_dim = not op.name.endswith(("mean.default", "sum.default", "prod.default"))
    axes = axes_of(op, "dim", self_type(op).rank) if has_dim else tuple(range(self_type(op).rank))
    keep = int(op.argument("keepdim")) if has_dim else 0
    kind = _REDUCTIONS[op.name.split(".")[1]]
    return context.builder.op(kind, operand(context, op, "self", dtype), context.builder.ints(*axes), keepdims=keep)


@emits("linalg_vector_norm.default")
def _vector_norm(context: Context, op: AtenOp) -> ir.Value:
    kind = {1: "ReduceL1", 2: "ReduceL2"}.get(op.argument("ord"))
    if kind is None:
        raise refuse(op, f"order {op.argument('ord')}")
    axes = (
        axes_of(op, "dim", self_type(op).rank) if op.argument("dim") is not None else tuple(range(self_type(op).rank))
    )
    value = operand(context, op, "self", result_type(op).dtype)
    return context.builder.op(kind, value, context.builder.ints(*axes), keepdims=int(op.argument("keepdim")))


@emits("any.dim", "any.default", "all.dim", "all.default", "any.dims", "all.dims")
def _truth(context: Context, op: AtenOp) -> ir.Value:
    b = context.builder
    has_dim = not op.name.endswith(".default")
    axes = axes_of(op, "dim", self_type(op).rank) if has_dim else tuple(range(self_type(op).rank))
    keep = int(op.argument("keepdim")) if has_dim else 0
    numbers = b.cast(operand(context, op, "self", DType.I1), DType.I32)
    kind = "ReduceMax" if op.name.startswith("aten.any") else "ReduceMin"
    return b.cast(b.op(kind, numbers, b.ints(*axes), keepdims=keep), DType.I1)


@emits("var.correction", "var.dim", "std.correction", "var_mean.correction")
def _variance(context: Context, op: AtenOp) -> ir.Value | tuple[ir.Value, ...]:
    b, kind = context.builder, self_type(op)
    x = context.value(op.tensor("self"))
    axes = axes_of(op, "dim", kind.rank)
    keep = int(op.argument("keepdim"))
    if op.name == "aten.var.dim":
        correction = int(op.argument("unbiased"))
    else:
        given = op.argument("correction")
        correction = 1 if given is None else given
    mean = b.op("ReduceMean", x, b.ints(*axes), keepdims=1)
    centred = b.op("Sub", x, mean)
    total = b.op("ReduceSum", b.op("Mul", centred, centred), b.ints(*axes), keepdims=keep)
    count: ir.Value = context.scalar(1.0, kind.dtype)
    for axis in axes:
        count = b.op("Mul", count, context.scalar(kind.shape[axis], kind.dtype))
    variance = b.op("Div", total, b.op("Sub", count, context.scalar(float(correction), kind.dtype)))
    if op.name.startswith("aten.std"):
        return b.op("Sqrt", variance)
    if op.name.startswith("aten.var_mean"):
        return variance, mean if keep else b.op("Squeeze", mean, b.ints(*axes))
    return variance


@emits("softmax.int", "_softmax.default", "log_softmax.int", "_log_softmax.default")
def _softmax(context: Context, op: AtenOp) -> ir.Value:
    kind = "LogSoftmax" if "log" in op.name else "Softmax"
    axis = normalized_axis(op.argument("dim"), self_type(op).rank)
    return context.builder.op(kind, operand(context, op, "self", result_type(op).dtype), axis=axis)


@emits("topk.default")
def _topk(context: Context, op: AtenOp) -> tuple[ir.Value, ...]:
    axis = normalized_axis(op.argument("dim"), self_type(op).rank)
    return context.builder.ops(
        "TopK",
        context.value(op.tensor("self")),
        context.size_vector(op.argument("k")),
        outputs=2,
        axis=axis,
        largest=int(op.argument("largest")),
        sorted=1,
    )


@emits("sort.default", "sort.stable")
def _sort(context: Context, op: AtenOp) -> tuple[ir.Value, ...]:
    """A full TopK, which is stable."""
    axis = normalized_axis(op.argument("dim"), self_type(op).rank)
    size = context.size_vector(self_type(op).shape[axis])
    largest = int(op.argument("descending"))
    return context.builder.ops(
        "TopK", context.value(op.tensor("self")), size, outputs=2, axis=axis, largest=largest, sorted=1
    )


@emits("argmax.default", "argmin.default")
def _arg_extreme(context: Context, op: AtenOp) -> ir.Value:
    if op.argument("dim") is None:
        raise refuse(op, "the index into a flattened tensor")
    kind = "ArgMax" if op.name == "aten.argmax.default" else "ArgMin"
    axis = normalized_axis(op.argument("dim"), self_type(op).rank)
    keep = int(op.argument("keepdim"))
    return context.builder.op(kind, context.value(op.tensor("self")), axis=axis, keepdims=keep)


@emits("max.dim", "min.dim")
def _extreme(context: Context, op: AtenOp) -> tuple[ir.Value, ...]:
    b, x = context.builder, context.value(op.tensor("self"))
    axis = normalized_axis(op.argument("dim"), self_type(op).rank)
    keep = int(op.argument("keepdim"))
    name = "Max" if op.name == "aten.max.dim" else "Min"
    return b.op(f"Reduce{name}", x, b.ints(axis), keepdims=keep), b.op(f"Arg{name}", x, axis=axis, keepdims=keep)


@emits("max.default", "min.default")
def _global_extreme(context: Context, op: AtenOp) -> ir.Value:
    kind = "ReduceMax" if op.name == "aten.max.default" else "ReduceMin"
    return context.builder.op(kind, context.value(op.tensor("self")), keepdims=0)


@emits("cumsum.default")
def _cumsum(context: Context, op: AtenOp) -> ir.Value:
    dtype = result_type(op).dtype
    axis = normalized_axis(op.argument("dim"), self_type(op).rank)
    return context.builder.op("CumSum", operand(context, op, "self", dtype), context.builder.integer(axis))


@emits("layer_norm.default", "native_layer_norm.default")
def _layer_norm(context: Context, op: AtenOp) -> ir.Value:
    b, kind = context.builder, result_type(op)
    if len(op.results) != 1 and any(result.uses for result in op.results[1:]):
        raise refuse(op, "mean and deviation are used")
    data = "input" if op.tensors("input") else "self"
    x = context.value(op.tensor(data))
    shape = op.argument("normalized_shape")
    scale = context.optional(next(iter(op.tensors("weight")), None))
    if scale is None:
        scale = b.op("Expand", context.scalar(1.0, kind.dtype), context.shape(shape))
    bias = context.optional(next(iter(op.tensors("bias")), None))
    return b.op("LayerNormalization", x, scale, bias, axis=-len(shape), epsilon=float(op.argument("eps")))


@emits("rms_norm.default")
def _rms_norm(context: Context, op: AtenOp) -> ir.Value:
    b, kind = context.builder, result_type(op)
    x = context.value(op.tensor("input"))
    axes = [-axis for axis in range(len(op.argument("normalized_shape")), 0, -1)]
    given = op.argument("eps")
    # torch's default is the smallest step of the element type
    epsilon = 1.1920928955078125e-07 if given is None else float(given)
    mean = b.op("ReduceMean", b.op("Mul", x, x), b.ints(*axes), keepdims=1)
    inverse = b.op("Reciprocal", b.op("Sqrt", b.op("Add", mean, context.scalar(epsilon, kind.dtype))))
    normed = b.op("Mul", x, inverse)
    return b.op("Mul", normed, context.value(op.tensor("weight"))) if op.tensors("weight") else normed


@emits("bincount.default", "nonzero.default", "unique.default")
def _data_dependent(context: Context, op: AtenOp) -> ir.Value:
    raise refuse(op, "the shape of its result depends on the data")
