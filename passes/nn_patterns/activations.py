"""Activations that are written out: they become the one aten operation that computes the same."""

from __future__ import annotations

import math
from typing import Any

from moec.dialects import aten
from moec.dialects.aten import AtenOp
from moec.ir import Value
from moec.passes.matching import added_number, both_orders, made_by, same, scaled_by_number, tensor
from moec.rewrite import Rewriter, rewrite

# torch.nn.functional.gelu(approximate="tanh"): Hendrycks and Gimpel 2016, section 2
_TANH_SCALE, _CUBE_FACTOR = math.sqrt(2.0 / math.pi), 0.044715


@rewrite("aten.mul.Tensor", "aten.mul.Scalar")
def raise_activation(op: AtenOp, rewriter: Rewriter) -> bool:
    """x * sigmoid(x) ==> silu(x); x / 2 * (1 + erf(x / sqrt(2))) ==> gelu(x), and the same with its tanh form"""
    if not tensor(op.result).dtype.is_float:
        return False
    for factor, product in _products(op.result):
        for x, curve in both_orders(product):
            name, arguments = _named(x, curve, factor)
            source = scaled_by_number(x)
            if not name and source is not None:
                name, arguments = _named(source[0], curve, factor * source[1])
                x = source[0]
            if name and tensor(x) == tensor(op.result):
                kind = (tensor(x),)
                rewriter.replace_with(op, aten.build(name, {"self": x}, kind, **arguments))
                return True
    return False


def _products(value: Value) -> list[tuple[float, AtenOp]]:
    """(c, product) where `value` is c * product."""
    product = made_by(value, "mul.Tensor")
    if product is not None:
        return [(1.0, product)]
    scaled = scaled_by_number(value)
    inner = made_by(scaled[0], "mul.Tensor") if scaled is not None else None
    return [(scaled[1], inner)] if scaled is not None and inner is not None else []


def _named(x: Value, curve: Value, factor: float) -> tuple[str, dict[str, Any]]:
    """The operation that computes factor * x * curve, empty where there is none, and its arguments."""
    sigmoid = made_by(curve, "sigmoid.default")
    if sigmoid is not None and factor == 1.0 and same(sigmoid.tensor("self"), x):
        return "silu.default", {}
    shifted = added_number(curve)
    if shifted is None or shifted[1] != 1.0 or factor != 0.5:
        return "", {}
    erf = made_by(shifted[0], "erf.default")
    if erf is not None and _is_scaled(erf.tensor("self"), x, math.sqrt(0.5)):
        return "gelu.default", {}
    tanh = made_by(shifted[0], "tanh.default")
    if tanh is not None and _is_tanh_argument(tanh.tensor("self"), x):
        return "gelu.default", {"approximate": "tanh"}
    return "", {}


def _is_scaled(value: Value, x: Value, factor: float) -> bool:
    """Whether `value` is x * factor up to rounding in float64."""
    scaled = scaled_by_number(value)
    return scaled is not None and same(scaled[0], x) and math.isclose(scaled[1], factor, rel_tol=1e-12)


def _is_tanh_argument(value: Value, x: Value) -> bool:
    """Whether `value` is sqrt(2 / pi) * (x + 0.044715 * x^3)."""
    scaled = scaled_by_number(value)
    if scaled is None or not math.isclose(scaled[1], _TANH_SCALE, rel_tol=1e-12):
        return False
    total = made_by(scaled[0], "add.Tensor")
    if total is None or total.argument("alpha") != 1:
        return False
    for plain, rest in both_orders(total):
        cube = scaled_by_number(rest)
        power = made_by(cube[0], "pow.Tensor_Scalar") if cube is not None else None
        if cube is not None and power is not None and math.isclose(cube[1], _CUBE_FACTOR, rel_tol=1e-12):
            return power.argument("exponent") == 3 and same(power.tensor("self"), x) and same(plain, x)
    return False


ACTIVATION_PATTERNS = (raise_activation,)
