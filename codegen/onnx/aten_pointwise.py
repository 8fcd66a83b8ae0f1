"""Emission of element-wise aten operations: arithmetic, comparison, activations, selection, casts."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from moec.codegen.onnx.context import NUMPY_DTYPES, Context, refuse
from moec.codegen.onnx.registry import cast_to, emits, operand, promoted, result_type, self_type
from moec.dialects.aten import AtenOp
from moec.ir.types import DType

_ARITHMETIC = {
    "mul.Tensor": "Mul",
    "mul.Scalar": "Mul",
    "maximum.default": "Max",
    "minimum.default": "Min",
}
_COMPARISONS = {
    "eq": "Equal",
    "lt": "Less",
    "le": "LessOrEqual",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
}
_UNARY = {
    "abs": "Abs",
    "acos": "Acos",
    "asin": "Asin",
    "atan": "Atan",
    "ceil": "Ceil",
    "cos": "Cos",
    "cosh": "Cosh",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "log": "Log",
    "neg": "Neg",
    "reciprocal": "Reciprocal",
    "relu": "Relu",
    "round": "Round",
    "sigmoid": "Sigmoid",
    "sign": "Sign",
    "sin": "Sin",
    "sinh": "Sinh",
    "sqrt": "Sqrt",
    "tan": "Tan",
    "tanh": "Tanh",
}
_IDENTITIES = (
    "alias.default",
    "clone.default",
    "contiguous.default",
    "detach.default",
    "detach_.default",
    "dropout.default",
    "lift_fresh_copy.default",
    "native_dropout.default",
)


def _binary(context: Context, op: AtenOp) -> ir.Value:
    kind = _ARITHMETIC[op.name.removeprefix("aten.")]
    dtype = result_type(op).dtype
    if dtype is DType.I1 and kind == "Mul":
        return context.builder.op("And", operand(context, op, "self", dtype), operand(context, op, "other", dtype))
    return context.builder.op(kind, operand(context, op, "self", dtype), operand(context, op, "other", dtype))


emits(*_ARITHMETIC)(_binary)


@emits("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Scalar", "rsub.Tensor")
def _add(context: Context, op: AtenOp) -> ir.Value:
    b, dtype = context.builder, result_type(op).dtype
    left, right = operand(context, op, "self", dtype), operand(context, op, "other", dtype)
    alpha = op.argument("alpha")
    if op.name.startswith("aten.rsub"):
        left = left if alpha == 1 else b.op("Mul", left, context.scalar(alpha, dtype))
        return b.op("Sub", right, left)
    if alpha != 1:
        right = b.op("Mul", right, context.scalar(alpha, dtype))
    if dtype is DType.I1:
        return b.op("Or", left, right)
    return b.op("Add" if op.name.startswith("aten.add") else "Sub", left, right)


@emits("div.Tensor", "div.Scalar", "div.Tensor_mode", "div.Scalar_mode", "floor_divide.default", "floor_divide.Scalar")
def _divide(context: Context, op: AtenOp) -> ir.Value:
    b, dtype = context.builder, result_type(op).dtype
    mode = "floor" if "floor_divide" in op.name else op.argument("rounding_mode") if "_mode" in op.name else None
    left, right = operand(context, op, "self", dtype), operand(context, op, "other", dtype)
    if mode == "floor" and not dtype.is_float:
        return b.op("Div", b.op("Sub", left, b.op("Mod", left, right)), right)
    quotient = b.op("Div", left, right)
    if mode == "floor":
        return b.op("Floor", quotient)
    if mode == "trunc" and dtype.is_float:
        return b.op("Mul", b.op("Sign", quotient), b.op("Floor", b.op("Abs", quotient)))
    return quotient


@emits("remainder.Scalar", "remainder.Tensor")
def _remainder(context: Context, op: AtenOp) -> ir.Value:
    b, dtype = context.builder, result_type(op).dtype
    left, right = operand(context, op, "self", dtype), operand(context, op, "other", dtype)
    if not dtype.is_float:
        return b.op("Mod", left, right)
    return b.op("Sub", left, b.op("Mul", b.op("Floor", b.op("Div", left, right)), right))


@emits("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar")
def _power(context: Context, op: AtenOp) -> ir.Value:
    b, dtype = context.builder, result_type(op).dtype
    base = operand(context, op, "self", dtype)
    if not op.tensors("exponent"):
        exponent = op.argument("exponent")
        if exponent == 2:
            return b.op("Mul", base, base)
        if exponent == 0.5:
            return b.op("Sqrt", base)
        if exponent == -0.5:
            return b.op("Reciprocal", b.op("Sqrt", base))
        if exponent == 1:
            return base
    return b.op("Pow", base, operand(context, op, "exponent", dtype))


def _compare(context: Context, op: AtenOp) -> ir.Value:
    kind = op.name.split(".")[1]
    dtype = promoted(op, "self", "other")
    left, right = operand(context, op, "self", dtype), operand(context, op, "other", dtype)
    if dtype is DType.I1 and kind not in ("eq", "ne"):
        left, right = context.builder.cast(left, DType.I32), context.builder.cast(right, DType.I32)
    if kind == "ne":
        return context.builder.op("Not", context.builder.op("Equal", left, right))
    return context.builder.op(_COMPARISONS[kind], left, right)


emits(*[f"{name}.{overload}" for name in (*_COMPARISONS, "ne") for overload in ("Tensor", "Scalar")])(_compare)


def _unary(context: Context, op: AtenOp) -> ir.Value:
    dtype = result_type(op).dtype
    return context.builder.op(_UNARY[op.name.split(".")[1]], operand(context, op, "self", dtype))


emits(*[f"{name}.default" for name in _UNARY])(_unary)


@emits("rsqrt.default")
def _rsqrt(context: Context, op: AtenOp) -> ir.Value:
    b = context.builder
    return b.op("Reciprocal", b.op("Sqrt", operand(context, op, "self", result_type(op).dtype)))


@emits("log1p.default", "expm1.default", "log2.default", "log10.default", "square.default")
def _more_unary(context: Context, op: AtenOp) -> ir.Value:
    b = context.builder
    x = operand(context, op, "self", result_type(op).dtype)
    match op.name.split(".")[1]:
        case "log1p":
            return b.op("Log", b.op("Add", x, b.number(1.0)))
        case "expm1":
            return b.op("Sub", b.op("Exp", x), b.number(1.0))
        case "log2":
            return b.op("Div", b.op("Log", x), b.number(math.log(2)))
        case "log10":
            return b.op("Div", b.op("Log", x), b.number(math.log(10)))
    return b.op("Mul", x, x)


@emits("silu.default", "mish.default", "hardswish.default", "hardsigmoid.default", "log_sigmoid_forward.default")
def _activation(context: Context, op: AtenOp) -> ir.Value | tuple[ir.Value, ...]:
    b, x = context.builder, context.value(op.tensor("self"))
    match op.name.split(".")[1]:
        case "silu":
            return b.op("Mul", x, b.op("Sigmoid", x))
        case "mish":
            return b.op("Mish", x)
        case "hardswish":
            return b.op("HardSwish", x)
        case "hardsigmoid":
            return b.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    value = b.op("Neg", b.op("Softplus", b.op("Neg", x)))
    return value, value


@emits("gelu.default")
def _gelu(context: Context, op: AtenOp) -> ir.Value:
    return context.builder.op("Gelu", context.value(op.tensor("self")), approximate=op.argument("approximate"))


@emits("elu.default", "leaky_relu.default", "hardtanh.default", "softplus.default", "relu6.default")
def _parametric(context: Context, op: AtenOp) -> ir.Value:
    b, x, dtype = context.builder, context.value(op.tensor("self")), result_type(op).dtype
    match op.name.split(".")[1]:
        case "elu":
            if op.argument("scale") != 1 or op.argument("input_scale") != 1:
                raise refuse(op, "scaled elu")
            return b.op("Elu", x, alpha=float(op.argument("alpha")))
        case "leaky_relu":
            return b.op("LeakyRelu", x, alpha=float(op.argument("negative_slope")))
        case "hardtanh":
            lower, upper = op.argument("min_val"), op.argument("max_val")
            return b.op("Clip", x, context.scalar(lower, dtype), context.scalar(upper, dtype))
        case "relu6":
            return b.op("Clip", x, context.scalar(0.0, dtype), context.scalar(6.0, dtype))
    beta, threshold = op.argument("beta"), op.argument("threshold")
    scaled = x if beta == 1 else b.op("Mul", x, context.scalar(float(beta), dtype))
    soft = b.op("Softplus", scaled)
    soft = soft if beta == 1 else b.op("Div", soft, context.scalar(float(beta), dtype))
    return b.op("Where", b.op("Greater", scaled, context.scalar(float(threshold), dtype)), x, soft)


@emits("clamp.default", "clamp.Tensor", "clamp_min.default", "clamp_max.default")
def _clamp(context: Context, op: AtenOp) -> ir.Value:
    b, dtype = context.builder, result_type(op).dtype
    x = operand(context, op, "self", dtype)
    for name, kind in (("min", "Max"), ("max", "Min")):
        if op.name.endswith(("clamp_min.default", "clamp_max.default")) and not op.name.endswith(
            f"clamp_{name}.default"
        ):
            continue
        if op.tensors(name) or (not op.name.endswith(".Tensor") and op.argument(name) is not None):
            x = b.op(kind, x, operand(context, op, name, dtype))
    return x


@emits("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def _where(context: Context, op: AtenOp) -> ir.Value:
    dtype = result_type(op).dtype
    condition = operand(context, op, "condition", DType.I1)
    chosen, other = operand(context, op, "self", dtype), operand(context, op, "other", dtype)
    return context.builder.op("Where", condition, chosen, other)


@emits("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(context: Context, op: AtenOp) -> ir.Value:
    dtype = result_type(op).dtype
    mask = context.value(op.tensor("mask"))
    return context.builder.op("Where", mask, operand(context, op, "value", dtype), operand(context, op, "self", dtype))


@emits("logical_and.default", "logical_or.default", "logical_xor.default")
@emits("bitwise_and.Tensor", "bitwise_or.Tensor", "bitwise_xor.Tensor", "bitwise_and.Scalar", "bitwise_or.Scalar")
def _logical(context: Context, op: AtenOp) -> ir.Value:
    kind = op.name.split(".")[1]
    dtype = result_type(op).dtype
    if dtype is not DType.I1:
        onnx_op = {"bitwise_and": "BitwiseAnd", "bitwise_or": "BitwiseOr", "bitwise_xor": "BitwiseXor"}[kind]
    else:
        onnx_op = {"and": "And", "or": "Or", "xor": "Xor"}[kind.rpartition("_")[2]]
    return context.builder.op(onnx_op, operand(context, op, "self", dtype), operand(context, op, "other", dtype))


@emits("logical_not.default", "bitwise_not.default")
def _not(context: Context, op: AtenOp) -> ir.Value:
    if op.name == "aten.bitwise_not.default" and self_type(op).dtype is not DType.I1:
        return context.builder.op("BitwiseNot", context.value(op.tensor("self")))
    return context.builder.op("Not", operand(context, op, "self", DType.I1))


@emits("isnan.default", "isinf.default", "isfinite.default")
def _classify(context: Context, op: AtenOp) -> ir.Value:
    b, x = context.builder, context.value(op.tensor("self"))
    match op.name.split(".")[1]:
        case "isnan":
            return b.op("IsNaN", x)
        case "isinf":
            return b.op("IsInf", x)
    return b.op("Not", b.op("Or", b.op("IsNaN", x), b.op("IsInf", x)))


@emits("_to_copy.default", "to.dtype", "type_as.default", "to.device", "to.dtype_layout")
def _to(context: Context, op: AtenOp) -> ir.Value:
    return cast_to(context, context.value(op.tensor("self")), self_type(op).dtype, result_type(op).dtype)


@emits(*_IDENTITIES)
def _identity(context: Context, op: AtenOp) -> ir.Value | tuple[ir.Value, ...]:
    name = "input" if op.tensors("input") else "self"
    value = context.value(op.tensor(name))
    return (value,) * len(op.results)


@emits("fill.Scalar", "full_like.default", "zeros_like.default", "ones_like.default", "new_zeros.default")
@emits("new_ones.default", "new_full.default", "full.default", "zeros.default", "ones.default", "empty_like.default")
@emits("new_empty.default", "empty.memory_format", "scalar_tensor.default")
def _full(context: Context, op: AtenOp) -> ir.Value:
    """A tensor of one number. What `empty` leaves undefined is zero here."""
    name = op.name.split(".")[1]
    kind = result_type(op)
    if "full" in name:
        number = op.argument("fill_value")
    elif name == "fill":
        number = op.argument("value")
    elif name == "scalar_tensor":
        number = op.argument("s")
    else:
        number = 1 if "ones" in name else 0
    if kind.is_static and kind.nbytes <= 4096 and isinstance(number, bool | int | float):
        return context.builder.constant(np.full(kind.static_shape, number, NUMPY_DTYPES[kind.dtype]))
    return context.builder.op("Expand", context.scalar(number, kind.dtype), context.shape(kind.shape))
