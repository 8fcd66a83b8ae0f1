"""Emission of aten products: linear layers, matrix products, attention that was not raised, convolutions, einsum."""

from __future__ import annotations

import onnx_ir as ir

from moec.codegen.onnx.context import Context, refuse, tensor_of
from moec.codegen.onnx.packed.product import named_packed, packed_product
from moec.codegen.onnx.registry import emits, operand, result_type
from moec.dialects.aten import AtenOp
from moec.ir.dimensions import DimExpr
from moec.ir.operation import Value
from moec.ir.types import DType, TensorType


@emits("linear.default")
def _linear(context: Context, op: AtenOp) -> ir.Value:
    x, weight = op.tensor("input"), op.tensor("weight")
    bias = context.optional(next(iter(op.tensors("bias")), None))
    return linear(context, context.value(x), tensor_of(x), weight, bias)


def linear(context: Context, x: ir.Value, kind: TensorType, weight: Value, bias: ir.Value | None) -> ir.Value:
    """x [..., in] times the transpose of weight [out, in], plus bias [out].

    A packed weight stays packed. Any other one that an embedding reads too stays as it is stored and goes to Gemm,
    which takes it transposed; the rest is stored as [in, out].
    """
    b = context.builder
    packed = named_packed(context, weight)
    if packed is not None:
        return packed_product(context, x, packed, bias)
    named = context.named_weight(weight)
    shape = tensor_of(weight).shape
    if named is not None and len(shape) == 2:
        if str(named.expression) in context.gathered:
            rows = x if kind.rank == 2 else b.reshape(x, (-1, _static(shape[1])))
            product = b.op("Gemm", rows, context.value(weight), bias, transB=1)
            return product if kind.rank == 2 else b.reshape(product, _unflattened(context, kind, shape[0]))
        matrix = context.transposed(named.expression, named.name)
        if kind.rank == 2 and bias is not None:
            return b.op("Gemm", x, matrix, bias)
    else:
        rank = len(shape)
        perm = (*range(rank - 2), rank - 1, rank - 2)
        matrix = b.op("Transpose", context.value(weight), perm=perm)
    product = b.op("MatMul", x, matrix)
    return product if bias is None else b.op("Add", product, bias)


def _unflattened(context: Context, kind: TensorType, width: int | DimExpr) -> list[int | ir.Value]:
    """The shape of `kind` with another last size, one size of it left to the runtime."""
    sizes: list[int | DimExpr] = [*kind.shape[:-1], width]
    inferred = next(axis for axis, size in enumerate(sizes) if isinstance(size, DimExpr) or axis == len(sizes) - 1)
    return [-1 if axis == inferred else context.size(size) for axis, size in enumerate(sizes)]


def _static(size: object) -> int:
    assert isinstance(size, int)
    return size


@emits("matmul.default", "mm.default", "bmm.default")
def _matmul(context: Context, op: AtenOp) -> ir.Value:
    dtype = result_type(op).dtype
    right = "other" if op.tensors("other") else "mat2"
    return context.builder.op("MatMul", operand(context, op, "self", dtype), operand(context, op, right, dtype))


@emits("addmm.default", "baddbmm.default")
def _addmm(context: Context, op: AtenOp) -> ir.Value:
    b, dtype = context.builder, result_type(op).dtype
    left, right = ("mat1", "mat2") if op.name == "aten.addmm.default" else ("batch1", "batch2")
    product = b.op("MatMul", context.value(op.tensor(left)), context.value(op.tensor(right)))
    if op.argument("alpha") != 1:
        product = b.op("Mul", product, context.scalar(float(op.argument("alpha")), dtype))
    bias = context.value(op.tensor("self"))
    if op.argument("beta") == 0:
        return product
    if op.argument("beta") != 1:
        bias = b.op("Mul", bias, context.scalar(float(op.argument("beta")), dtype))
    return b.op("Add", product, bias)


@emits("einsum.default")
def _einsum(context: Context, op: AtenOp) -> ir.Value:
    equation = op.argument("equation").replace(" ", "")
    return context.builder.op("Einsum", *[context.value(v) for v in op.tensors("tensors")], equation=equation)


@emits("outer.default", "dot.default", "mv.default")
def _vector(context: Context, op: AtenOp) -> ir.Value:
    b = context.builder
    left = context.value(op.tensor("self"))
    if op.name == "aten.outer.default":
        return b.op("Mul", b.op("Unsqueeze", left, b.ints(1)), context.value(op.tensor("vec2")))
    return b.op("MatMul", left, context.value(op.tensor("tensor" if op.name == "aten.dot.default" else "vec")))


@emits("scaled_dot_product_attention.default")
def _attention(context: Context, op: AtenOp) -> ir.Value:
    """Attention that no pattern raised: [..., heads, S, D] with as many key heads as query heads."""
    b = context.builder
    query, key = tensor_of(op.tensor("query")), tensor_of(op.tensor("key"))
    if op.argument("is_causal") or op.argument("enable_gqa") or op.argument("dropout_p"):
        raise refuse(op, "causal or grouped attention that was not raised to nn.attention")
    width = query.shape[-1]
    scale = op.argument("scale")
    if scale is None:
        scale = float(_static(width)) ** -0.5
    perm = (*range(key.rank - 2), key.rank - 1, key.rank - 2)
    scores = b.op(
        "MatMul", context.value(op.tensor("query")), b.op("Transpose", context.value(op.tensor("key")), perm=perm)
    )
    scores = b.op("Mul", scores, context.scalar(float(scale), query.dtype))
    if op.tensors("attn_mask"):
        mask = context.value(op.tensor("attn_mask"))
        if tensor_of(op.tensor("attn_mask")).dtype is DType.I1:
            mask = b.op("Where", mask, b.number(0.0), b.number(-3.4028234663852886e38))
        scores = b.op("Add", scores, mask)
    return b.op("MatMul", b.op("Softmax", scores, axis=-1), context.value(op.tensor("value")))


@emits("conv1d.default", "conv1d.padding", "convolution.default", "conv2d.default")
def _convolution(context: Context, op: AtenOp) -> ir.Value:
    """Convolution over one or two axes; `self` or `input` [batch, channels, ...]."""
    b = context.builder
    rank = tensor_of(op.tensor("weight")).rank - 2
    if op.name == "aten.convolution.default" and op.argument("transposed"):
        raise refuse(op, "transposed convolution")
    padding = op.argument("padding")
    same: str | None = None
    pads: list[int] | None = None
    if isinstance(padding, str):
        same = {"same": "SAME_UPPER", "valid": "VALID"}[padding]
    else:
        pads = [*_spread(padding, rank), *_spread(padding, rank)]
    bias = context.optional(next(iter(op.tensors("bias")), None))
    return b.op(
        "Conv",
        context.value(op.tensor("input")),
        context.value(op.tensor("weight")),
        bias,
        strides=_spread(op.argument("stride"), rank),
        dilations=_spread(op.argument("dilation"), rank),
        group=op.argument("groups"),
        pads=pads,
        auto_pad=same,
    )


def _spread(value: int | tuple[int, ...], rank: int) -> list[int]:
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * rank if len(numbers) == 1 else numbers
