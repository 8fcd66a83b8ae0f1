"""Finds out whether a function treats each token by itself, but for attention.

Only then may a key/value cache stand in for the tokens that came before: every other way from one token to the next,
and every position that is counted from the start of the input, would be lost with them. Operations are judged by a
list of those that are known to keep tokens apart; whatever is not on it counts as mixing them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from moec.dialects.aten import AtenOp
from moec.dialects.builtin import FuncOp
from moec.dialects.moe import ExpertsOp, ReplicaOp, RouteOp
from moec.dialects.nn import AttentionMaskOp, AttentionOp, LayerNormOp, MLPOp, RMSNormOp, RotaryOp
from moec.ir import DimExpr, Operation, TensorType, Value
from moec.passes.matching import made_by, shape


@dataclass(frozen=True)
class Obstacle:
    """An operation that keeps a function from being computed token by token, and why."""

    op: Operation
    reason: str


def find_obstacle(function: FuncOp, symbol: str) -> Obstacle | None:
    """The first operation whose result for one token depends on other tokens, or on how many came before it.

    `symbol` is the size that counts tokens. Attention and its masks are not looked at.
    """
    judge = _Judge(symbol)
    for op in function.body:
        if not op.has_uses or isinstance(op, AttentionOp | AttentionMaskOp):
            continue
        reason = judge(op)
        if reason:
            return Obstacle(op, reason)
    return None


_ELEMENTWISE = frozenset(
    f"aten.{name}"
    for name in (
        "abs.default", "add.Scalar", "add.Tensor", "bitwise_and.Tensor", "bitwise_not.default", "bitwise_or.Tensor",
        "ceil.default", "clamp.Tensor", "clamp.default", "clamp_max.default", "clamp_min.default", "cos.default",
        "div.Scalar", "div.Tensor", "elu.default", "eq.Scalar", "eq.Tensor", "erf.default", "exp.default",
        "expm1.default", "floor.default", "floor_divide.Scalar", "full_like.default", "ge.Scalar", "ge.Tensor",
        "gelu.default", "gt.Scalar", "gt.Tensor", "hardsigmoid.default", "hardswish.default", "hardtanh.default",
        "isnan.default", "le.Scalar", "le.Tensor", "leaky_relu.default", "log.default", "log1p.default",
        "log_sigmoid_forward.default", "logical_and.default", "logical_not.default", "logical_or.default",
        "lt.Scalar", "lt.Tensor", "masked_fill.Scalar", "maximum.default", "minimum.default", "mish.default",
        "mul.Scalar", "mul.Tensor", "ne.Scalar", "ne.Tensor", "neg.default", "ones_like.default", "pow.Scalar",
        "pow.Tensor_Scalar", "pow.Tensor_Tensor", "reciprocal.default", "relu.default", "remainder.Scalar",
        "rsqrt.default", "rsub.Scalar", "selu.default", "sigmoid.default", "sign.default", "silu.default",
        "sin.default", "softplus.default", "sqrt.default", "square.default", "sub.Scalar", "sub.Tensor",
        "tanh.default", "where.ScalarOther", "where.ScalarSelf", "where.self", "zeros_like.default",
        "_to_copy.default", "logit.default", "trunc.default", "round.default", "copy.default", "celu.default",
    )
)  # fmt: skip
# They work along `dim`, and keep the other axes apart.
_ALONG_AN_AXIS = frozenset(
    f"aten.{name}"
    for name in (
        "softmax.int", "_softmax.default", "log_softmax.int", "topk.default", "sort.default", "sort.stable",
        "argsort.default", "max.dim", "min.dim", "amax.default", "amin.default", "argmax.default", "sum.dim_IntList",
        "mean.dim", "var.correction", "var.dim", "prod.dim_int", "cumsum.default", "any.dim", "all.dim",
        "logsumexp.default", "split_with_sizes.default", "split.Tensor", "chunk.default", "slice.Tensor",
        "select.int", "unbind.int", "cat.default", "gather.default", "scatter.value", "scatter.src",
        "slice_scatter.default", "index_select.default", "linalg_vector_norm.default", "flip.default", "glu.default",
        "unfold.default",
    )
)  # fmt: skip
# Arguments that are values of the arithmetic, unlike sizes.
_NUMBERS = ("other", "value", "fill_value", "s", "min", "max", "exponent", "alpha", "self")
_VIEWS = frozenset({"aten.view.default", "aten.reshape.default", "aten._unsafe_view.default"})
_REARRANGING = frozenset(
    f"aten.{name}"
    for name in (
        "permute.default", "transpose.int", "t.default", "unsqueeze.default", "squeeze.dim", "squeeze.dims",
        "squeeze.default", "clone.default", "one_hot.default",
    )
)  # fmt: skip
_FILLED = frozenset(f"aten.{name}" for name in ("ones.default", "zeros.default", "full.default", "empty.memory_format"))
_PRODUCTS = frozenset({"aten.matmul.default", "aten.mm.default", "aten.bmm.default", "aten.addmm.default"})
_NORMS = frozenset({"aten.layer_norm.default", "aten.native_layer_norm.default", "aten.rms_norm.default"})


class _Judge:
    """Says for one operation why it does not keep tokens apart; empty where it does."""

    def __init__(self, symbol: str) -> None:
        self._symbol = symbol
        self._special: dict[str, Callable[[Any], str]] = {
            "aten.linear.default": self._linear,
            "aten.embedding.default": self._lookup,
            "aten.index.Tensor": self._lookup,
            "aten.expand.default": self._expand,
            **dict.fromkeys(_VIEWS, self._view),
            **dict.fromkeys(_PRODUCTS, self._product),
            **dict.fromkeys(_NORMS, self._norm),
            **dict.fromkeys(_ALONG_AN_AXIS, self._along_an_axis),
            **dict.fromkeys(_ELEMENTWISE, self._elementwise),
            **dict.fromkeys(_REARRANGING | _FILLED, lambda op: ""),
        }

    def __call__(self, op: Operation) -> str:
        for name in _NUMBERS:
            given = op.attributes.get(name)
            if isinstance(given, DimExpr) and self._symbol in given.symbols():
                return "it computes with the number of tokens"
        if not any(self._axes(value) for value in (*op.operands, *op.results)):
            return ""
        for result in op.results:
            if len(self._axes(result)) > 1:
                return "its result holds a value for each pair of tokens"
            if any(self._shared(shape(result)[at]) for at in self._axes(result)):
                return "an axis of its result counts tokens and something else"
        if isinstance(op, RMSNormOp | LayerNormOp | MLPOp):
            return self._not_last(op.x)
        if isinstance(op, RouteOp | ReplicaOp | ExpertsOp):
            return self._not_last(op.operands[0])
        if isinstance(op, RotaryOp):
            return "" if self._axes(op.x) == [2] and self._axes(op.cos) in ([], [1]) else "its axes are out of order"
        if isinstance(op, AtenOp) and op.name in self._special:
            return self._special[op.name](op)
        return "it is not known to keep tokens apart"

    def _axes(self, value: Value) -> list[int]:
        """The axes that count tokens."""
        kind = value.type
        if not isinstance(kind, TensorType):
            return []
        return [
            at for at, size in enumerate(kind.shape) if isinstance(size, DimExpr) and self._symbol in size.symbols()
        ]

    def _shared(self, size: int | DimExpr) -> bool:
        """Whether an axis counts more than the tokens of a batch, so that their order in it is not known."""
        assert isinstance(size, DimExpr)
        (atoms, factor), *others = size.terms
        return bool(others) or factor != 1 or not all(isinstance(atom, str) for atom in atoms)

    def _not_last(self, value: Value) -> str:
        return "it works along the tokens" if len(shape(value)) - 1 in self._axes(value) else ""

    def _linear(self, op: AtenOp) -> str:
        if any(self._axes(value) for value in op.operands[1:]):
            return "it multiplies tokens by tokens"
        return self._not_last(op.operands[0])

    def _product(self, op: AtenOp) -> str:
        left = op.tensor("mat1" if op.name == "aten.addmm.default" else "self")
        if any(self._axes(value) for value in op.operands if value is not left):
            return "it multiplies tokens by tokens"
        return self._not_last(left)

    def _norm(self, op: AtenOp) -> str:
        width = len(op.argument("normalized_shape"))
        x = op.tensor("input")
        first = len(shape(x)) - width
        return "it works along the tokens" if any(at >= first for at in self._axes(x)) else ""

    def _lookup(self, op: AtenOp) -> str:
        table = op.tensor("weight" if op.name == "aten.embedding.default" else "self")
        return "it looks up tokens by an index" if self._axes(table) else ""

    def _expand(self, op: AtenOp) -> str:
        return self._aligned(op.operands, op.result)

    def _elementwise(self, op: AtenOp) -> str:
        for result in op.results:
            problem = self._aligned(op.operands, result)
            if problem:
                return problem
        return ""

    def _aligned(self, operands: tuple[Value, ...], result: Value) -> str:
        """Whether axes that count tokens meet the same axes of the result."""
        for value in operands:
            offset = len(shape(result)) - len(shape(value))
            for at in self._axes(value):
                if shape(result)[at + offset] != shape(value)[at]:
                    return "it lays tokens over other values"
        return ""

    def _view(self, op: AtenOp) -> str:
        before, after = shape(op.operands[0]), shape(op.result)
        old, new = self._axes(op.operands[0]), self._axes(op.result)
        if len(old) != 1 or len(new) != 1 or prod(before[old[0] + 1 :]) != prod(after[new[0] + 1 :]):
            return "it moves elements between tokens"
        return ""

    def _along_an_axis(self, op: AtenOp) -> str:
        source = op.operands[0]
        given = op.argument("dim")
        rank = len(shape(source))
        worked = range(rank) if given is None or given == () else given if isinstance(given, tuple) else (given,)
        tokens = self._axes(source)
        if not tokens and any(self._axes(result) for result in op.results):
            return "it takes one entry for each token, counted from the start of the input"
        if any(dim % rank in tokens for dim in worked) and not self._takes_all(op):
            return "it works along the tokens"
        others = [value for value in op.operands[1:] if self._axes(value) and self._axes(value) != tokens]
        return "it lays tokens over other values" if others else ""

    def _takes_all(self, op: AtenOp) -> bool:
        return op.name == "aten.slice.Tensor" and shape(op.result) == shape(op.operands[0]) and op.argument("step") == 1


def is_ones(value: Value) -> AtenOp | None:
    """The operation that fills `value` with ones."""
    ones = made_by(value, "ones.default")
    full = made_by(value, "full.default")
    return ones or (full if full is not None and full.argument("fill_value") == 1 else None)
