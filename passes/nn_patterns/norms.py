"""Norms over the last axis: `nn.rms_norm` and `nn.layer_norm`.

The arithmetic is raised in steps: first x / sqrt(mean(x^2) + epsilon) without a weight, then a norm of a centred
input becomes a layer norm, then multiplications by a vector and additions of one move in as weight and bias.
"""

from __future__ import annotations

from moec.dialects.aten import AtenOp
from moec.dialects.nn import LayerNormOp, RMSNormOp
from moec.ir import DType, Value
from moec.passes.matching import added_number, both_orders, channel_vector, is_last_axis, made_by, same, tensor
from moec.rewrite import Rewriter, rewrite

# torch.finfo(dtype).eps, which torch takes where rms_norm is given no epsilon
_MACHINE_EPSILON = {DType.F64: 2.0**-52, DType.F32: 2.0**-23, DType.F16: 2.0**-10, DType.BF16: 2.0**-7}


@rewrite("aten.mul.Tensor", "aten.div.Tensor")
def raise_unweighted_norm(op: AtenOp, rewriter: Rewriter) -> bool:
    """x * rsqrt(mean(x^2) + epsilon) ==> rms_norm(x); with the variance of x, (x - mean) * ... ==> layer_norm(x)"""
    for x, root in _normalised(op):
        if tensor(x) != tensor(op.result) or not tensor(x).dtype.is_float:
            continue
        average, epsilon = added_number(root) or (root, 0.0)
        squared = _mean_of_square(average)
        if squared is not None and same(squared, x):
            rewriter.replace_with(op, RMSNormOp(x, None, epsilon=epsilon))
            return True
        source = _centred(x)
        variance = _variance_of(average)
        if source is not None and variance is not None and same(variance, source):
            rewriter.replace_with(op, LayerNormOp(source, None, None, epsilon=epsilon))
            return True
    return False


@rewrite(RMSNormOp)
def raise_centred_norm(op: RMSNormOp, rewriter: Rewriter) -> bool:
    """rms_norm(x - mean(x)) ==> layer_norm(x)"""
    source = _centred(op.x)
    if source is None or op.offset != 0.0:
        return False
    rewriter.replace_with(op, LayerNormOp(source, op.weight, None, epsilon=op.epsilon))
    return True


@rewrite("aten.mul.Tensor")
def move_weight_into_norm(op: AtenOp, rewriter: Rewriter) -> bool:
    """norm(x) * w ==> norm(x, w); norm(x) * (w + c) ==> rms_norm(x, w){offset = c}"""
    for normed, factor in both_orders(op):
        norm = normed.defining_op
        if not isinstance(norm, RMSNormOp | LayerNormOp) or norm.weight is not None or not normed.has_one_use:
            continue
        weight = channel_vector(factor, normed)
        if weight is None or tensor(op.result) != tensor(normed):
            continue
        if isinstance(norm, RMSNormOp):
            plain, offset = added_number(weight) or (weight, 0.0)
            rewriter.replace_with(op, RMSNormOp(norm.x, plain, epsilon=norm.epsilon, offset=offset))
            return True
        if norm.bias is None:
            rewriter.replace_with(op, LayerNormOp(norm.x, weight, None, epsilon=norm.epsilon))
            return True
    return False


@rewrite("aten.add.Tensor")
def move_bias_into_norm(op: AtenOp, rewriter: Rewriter) -> bool:
    """layer_norm(x, w) + b ==> layer_norm(x, w, b)"""
    if op.argument("alpha") != 1:
        return False
    for normed, other in both_orders(op):
        norm = normed.defining_op
        if isinstance(norm, LayerNormOp) and norm.bias is None and normed.has_one_use:
            bias = channel_vector(other, normed)
            if bias is not None and tensor(op.result) == tensor(normed):
                rewriter.replace_with(op, LayerNormOp(norm.x, norm.weight, bias, epsilon=norm.epsilon))
                return True
    return False


@rewrite("aten.rms_norm.default", "aten._fused_rms_norm.default")
def raise_rms_norm(op: AtenOp, rewriter: Rewriter) -> bool:
    """aten.rms_norm over the last axis ==> rms_norm"""
    x = op.tensor("input")
    if len(op.argument("normalized_shape")) != 1:
        return rewriter.refuse(op, f"it is a norm over the last {len(op.argument('normalized_shape'))} axes, not one")
    if any(result.uses for result in op.results[1:]):
        return rewriter.refuse(op, "its reciprocal root is used, too")
    epsilon = op.argument("eps")
    weights = op.tensors("weight")
    norm = RMSNormOp(
        x,
        weights[0] if weights else None,
        epsilon=_MACHINE_EPSILON[tensor(x).dtype] if epsilon is None else float(epsilon),
    )
    _replace_first_result(op, norm, rewriter)
    return True


@rewrite("aten.layer_norm.default", "aten.native_layer_norm.default")
def raise_layer_norm(op: AtenOp, rewriter: Rewriter) -> bool:
    """aten.layer_norm over the last axis ==> layer_norm"""
    if len(op.argument("normalized_shape")) != 1:
        return rewriter.refuse(op, f"it is a norm over the last {len(op.argument('normalized_shape'))} axes, not one")
    if any(result.uses for result in op.results[1:]):
        return rewriter.refuse(op, "its mean or reciprocal root is used, too")
    weights, biases = op.tensors("weight"), op.tensors("bias")
    norm = LayerNormOp(
        op.tensor("input"),
        weights[0] if weights else None,
        biases[0] if biases else None,
        epsilon=float(op.argument("eps")),
    )
    _replace_first_result(op, norm, rewriter)
    return True


def _replace_first_result(op: AtenOp, norm: RMSNormOp | LayerNormOp, rewriter: Rewriter) -> None:
    rewriter.insert(norm)
    rewriter.replace(op, [norm.y, *op.results[1:]])


def _normalised(op: AtenOp) -> list[tuple[Value, Value]]:
    """(x, a) for every reading of the operation as x / sqrt(a)."""
    if op.name == "aten.div.Tensor":
        root = made_by(op.tensor("other"), "sqrt.default")
        power = made_by(op.tensor("other"), "pow.Tensor_Scalar")
        if root is not None:
            return [(op.tensor("self"), root.tensor("self"))]
        if power is not None and power.argument("exponent") == 0.5:
            return [(op.tensor("self"), power.tensor("self"))]
        return []
    found = []
    for x, factor in both_orders(op):
        inverse = made_by(factor, "rsqrt.default")
        power = made_by(factor, "pow.Tensor_Scalar")
        reciprocal = made_by(factor, "reciprocal.default")
        root = made_by(reciprocal.tensor("self"), "sqrt.default") if reciprocal is not None else None
        if power is not None and power.argument("exponent") != -0.5:
            power = None
        made = inverse or power or root
        if made is not None:
            found.append((x, made.tensor("self")))
    return found


def _mean_of_square(value: Value) -> Value | None:
    mean = made_by(value, "mean.dim")
    if mean is None or not is_last_axis(mean) or not mean.argument("keepdim"):
        return None
    squared = mean.tensor("self")
    power = made_by(squared, "pow.Tensor_Scalar")
    if power is not None and power.argument("exponent") == 2:
        return power.tensor("self")
    product = made_by(squared, "mul.Tensor")
    if product is not None and same(product.tensor("self"), product.tensor("other")):
        return product.tensor("self")
    square = made_by(squared, "square.default")
    return square.tensor("self") if square is not None else None


def _variance_of(value: Value) -> Value | None:
    """x where `value` is its biased variance over the last axis, with that axis kept."""
    variance = made_by(value, "var.correction", "var_mean.correction", "var.dim")
    if variance is None or value is not variance.results[0]:
        return None
    unbiased = (
        variance.argument("unbiased") if variance.name == "aten.var.dim" else variance.argument("correction") != 0
    )
    if unbiased or not variance.argument("keepdim") or not is_last_axis(variance):
        return None
    return variance.tensor("self")


def _centred(value: Value) -> Value | None:
    """x where `value` is x - mean(x) over the last axis."""
    difference = made_by(value, "sub.Tensor")
    if difference is None or difference.argument("alpha") != 1:
        return None
    source, average = difference.tensor("self"), difference.tensor("other")
    mean = made_by(average, "mean.dim")
    if mean is not None and same(mean.tensor("self"), source) and mean.argument("keepdim") and is_last_axis(mean):
        return source
    both = made_by(average, "var_mean.correction")
    if both is not None and average is both.results[1] and both.tensor("self") is source and both.argument("keepdim"):
        return source if is_last_axis(both) else None
    return None


NORM_PATTERNS = (
    raise_rms_norm,
    raise_layer_norm,
    raise_unweighted_norm,
    raise_centred_norm,
    move_weight_into_norm,
    move_bias_into_norm,
)
