"""The function between an expert's products, as an expression for Triton and as one for torch.

Only elementwise operations that need no function of a device library are spelled; reductions and others are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from moec.dialects.aten import AtenOp
from moec.dialects.builtin import ConstantOp
from moec.errors import UnsupportedModelError
from moec.experts import Activation
from moec.ir import DType, TensorType, Value


@dataclass(frozen=True)
class ActivationSource:
    """The lines of a function of `gate` (if `gated`) and `up`, float32 blocks; the last line returns it."""

    gated: bool
    triton: tuple[str, ...]
    torch: tuple[str, ...]


LINEAR = ActivationSource(False, ("return up",), ("return up",))
"""No function: for experts that are one linear map."""


@dataclass(frozen=True)
class _Spelling:
    """Templates over the operands `{0}`, `{1}` and the arguments by name."""

    triton: str
    torch: str


_TANH = "(2.0 * tl.sigmoid(2.0 * ({0})) - 1.0)"
_LOG1P_EXP = "(tl.maximum({0}, 0.0) + tl.log(1.0 + tl.exp(-tl.abs({0}))))"

_SPELLINGS: Mapping[str, _Spelling] = {
    "silu.default": _Spelling("{0} * tl.sigmoid({0})", "torch.nn.functional.silu({0})"),
    "sigmoid.default": _Spelling("tl.sigmoid({0})", "torch.sigmoid({0})"),
    "relu.default": _Spelling("tl.maximum({0}, 0.0)", "torch.relu({0})"),
    "tanh.default": _Spelling(_TANH, "torch.tanh({0})"),
    "erf.default": _Spelling("tl.erf({0})", "torch.erf({0})"),
    "exp.default": _Spelling("tl.exp({0})", "torch.exp({0})"),
    "abs.default": _Spelling("tl.abs({0})", "torch.abs({0})"),
    "neg.default": _Spelling("-{0}", "-{0}"),
    "square.default": _Spelling("{0} * {0}", "{0} * {0}"),
    "softplus.default": _Spelling(_LOG1P_EXP, "torch.nn.functional.softplus({0})"),
    "mish.default": _Spelling("{0} * " + _TANH.format(_LOG1P_EXP), "torch.nn.functional.mish({0})"),
    "mul.Tensor": _Spelling("{0} * {1}", "{0} * {1}"),
    "mul.Scalar": _Spelling("{0} * {other}", "{0} * {other}"),
    "div.Tensor": _Spelling("{0} / {1}", "{0} / {1}"),
    "div.Scalar": _Spelling("{0} / {other}", "{0} / {other}"),
    "add.Tensor": _Spelling("{0} + {alpha} * {1}", "{0} + {alpha} * {1}"),
    "add.Scalar": _Spelling("{0} + {other}", "{0} + {other}"),
    "sub.Tensor": _Spelling("{0} - {alpha} * {1}", "{0} - {alpha} * {1}"),
    "sub.Scalar": _Spelling("{0} - {other}", "{0} - {other}"),
    "maximum.default": _Spelling("tl.maximum({0}, {1})", "torch.maximum({0}, {1})"),
    "minimum.default": _Spelling("tl.minimum({0}, {1})", "torch.minimum({0}, {1})"),
    "clamp_min.default": _Spelling("tl.maximum({0}, {min})", "{0}.clamp_min({min})"),
    "clamp_max.default": _Spelling("tl.minimum({0}, {max})", "{0}.clamp_max({max})"),
}

_KEPT = frozenset({"alias.default", "clone.default", "detach.default"})
_SQRT_HALF = repr(math.sqrt(0.5))
_SQRT_TWO_OVER_PI = repr(math.sqrt(2.0 / math.pi))


def spell_activation(activation: Activation, where: str) -> ActivationSource:
    """The source of an activation. Raises UnsupportedModelError for one that has no form on a GPU."""
    block = activation.block
    names: dict[Value, str] = dict(zip(block.arguments, ["gate", "up"] if activation.gated else ["up"], strict=True))
    lines: tuple[list[str], list[str]] = ([], [])
    for op in block:
        if op is block.last:
            break
        if isinstance(op, ConstantOp):
            names[op.value] = _number(op, where)
            continue
        if not isinstance(op, AtenOp):
            raise _refusal(op.name, where)
        kind = op.name.removeprefix("aten.")
        if kind in _KEPT or (kind == "_to_copy.default" and _is_float(op.results[0])):
            names[op.results[0]] = names[op.operands[0]]
            continue
        spelling = _spelling(op, kind, where)
        operands = [names[value] for value in op.operands]
        arguments = {name: _literal(op, name) for name in ("other", "alpha", "min", "max") if _has(op, name)}
        name = f"step_{len(lines[0])}"
        for out, template in zip(lines, (spelling.triton, spelling.torch), strict=True):
            out.append(f"{name} = {template.format(*operands, **arguments)}")
        names[op.results[0]] = name
    result = names[block.terminator.operands[0]]
    for out in lines:
        last = f"{result} = "
        if out and out[-1].startswith(last):
            out[-1] = f"return {out[-1].removeprefix(last)}"
        else:
            out.append(f"return {result}")
    return ActivationSource(activation.gated, tuple(lines[0]), tuple(lines[1]))


def _spelling(op: AtenOp, kind: str, where: str) -> _Spelling:
    found = _SPELLINGS.get(kind)
    if found is None and kind in _SPECIAL:
        found = _SPECIAL[kind](op)
    if found is None:
        raise _refusal(op.name, where)
    return found


def _gelu(op: AtenOp) -> _Spelling:
    form = op.argument("approximate")
    if form == "tanh":
        inner = _SQRT_TWO_OVER_PI + " * ({0} + 0.044715 * {0} * {0} * {0})"
        return _Spelling("{0} * tl.sigmoid(2.0 * (" + inner + "))", "torch.nn.functional.gelu({0}, approximate='tanh')")
    return _Spelling("0.5 * {0} * (1.0 + tl.erf({0} * " + _SQRT_HALF + "))", "torch.nn.functional.gelu({0})")


def _power(op: AtenOp) -> _Spelling | None:
    exponent = op.argument("exponent")
    if exponent not in (2, 3):
        return None
    return _Spelling(" * ".join(["{0}"] * int(exponent)), f"{{0}} ** {int(exponent)}")


def _clamp(op: AtenOp) -> _Spelling | None:
    triton, torch = "{0}", "{0}"
    if op.argument("min") is not None:
        triton = "tl.maximum(" + triton + ", {min})"
    if op.argument("max") is not None:
        triton = "tl.minimum(" + triton + ", {max})"
    bounds = [f"{name}={{{name}}}" for name in ("min", "max") if op.argument(name) is not None]
    torch = "{0}.clamp(" + ", ".join(bounds) + ")"
    return _Spelling(triton, torch) if bounds else None


def _leaky_relu(op: AtenOp) -> _Spelling:
    slope = _float(op.argument("negative_slope"))
    return _Spelling(
        "tl.where({0} > 0.0, {0}, {0} * " + slope + ")", "torch.nn.functional.leaky_relu({0}, " + slope + ")"
    )


_SPECIAL: Mapping[str, Callable[[AtenOp], _Spelling | None]] = {
    "gelu.default": _gelu,
    "pow.Tensor_Scalar": _power,
    "clamp.default": _clamp,
    "leaky_relu.default": _leaky_relu,
}


def _has(op: AtenOp, name: str) -> bool:
    try:
        return isinstance(op.argument(name), int | float)
    except KeyError:
        return False


def _literal(op: AtenOp, name: str) -> str:
    return _float(op.argument(name))


def _float(value: object) -> str:
    assert isinstance(value, int | float) and math.isfinite(value)
    return repr(float(value))


def _number(op: ConstantOp, where: str) -> str:
    kind = op.value.type
    assert isinstance(kind, TensorType)
    types = {DType.F32: np.float32, DType.F64: np.float64, DType.I64: np.int64}
    if kind.dtype not in types or len(op.data.data) != np.dtype(types[kind.dtype]).itemsize:
        raise UnsupportedModelError("an activation reads a constant that is no single number", where=where)
    return _float(float(np.frombuffer(op.data.data, types[kind.dtype])[0]))


def _is_float(value: Value) -> bool:
    return isinstance(value.type, TensorType) and value.type.dtype.is_float


def _refusal(name: str, where: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"an activation has {name}, which the Triton backend has no form of", where=where, hint="emit ONNX instead"
    )
