"""Channels of large activations made smaller, and the columns that read them larger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch

from moec.calibration.sample import LayerSample
from moec.dialects.builtin import WeightOp
from moec.dialects.nn import LayerNormOp, RMSNormOp
from moec.errors import UsageError
from moec.experts import FeedForward, MoeLayer, UnreadableExpertError, find_moe_layers, find_unreadable, load_expert
from moec.experts.parts import erase_unused, new_weight, store_unrounded
from moec.ir import Operation, Value
from moec.passes.factoring.sides import Side, dense_matrix, projection
from moec.passes.matching import shape, tensor
from moec.passes.norm_folding.folding import NotLinearError, readers_of
from moec.passes.norm_folding.linear_maps import Change, LinearMap, linear_map, load_matrix, rewrite_map
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass
from moec.weights.context import WeightContext
from moec.weights.tensor_spec import TensorSpec

_VIEWS = ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.alias.default")


class Aggregate(Enum):
    """How the wishes of the router and of all experts become one factor per channel."""

    MAX = "max"
    MEAN = "mean"


@register_pass("smooth-experts")
@dataclass(frozen=True)
class SmoothExperts(Pass):
    """Divides the input channels of each layer of experts by factors that make rounding easier (EAQuant).

    1. The router and every expert i wish for max|x_j|^a / max|W_:j|^(1 - a) on channel j, with the rows x of the
       calibration that reach it and the matrices W that read them. One vector must serve them all: the largest wish,
       or the mean.
    2. Factors are rounded to powers of two, so that weights stay exact in every floating-point type.
    3. The norm in front of the layer is divided by them; everything that reads it, shared experts too, is multiplied.

    The function stays. What was calibrated does not, so that `calibrate` must run again behind it. Layers whose input
    is not that of a norm, or that something other than linear maps reads, are left alone.
    """

    claim: ClassVar[Claim] = Claim.EXACT
    anchor: ClassVar[str] = "builtin.module"
    smoothed = Statistic("layers smoothed")

    alpha: float = option("share of the range that moves from activations to weights", 0.6)
    aggregate: Aggregate = option("how wishes are joined", Aggregate.MAX)
    router: bool = option("the router has a wish, too", True)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha {self.alpha:g} is not within 0..1")

    def run(self, op: Operation, context: PassContext) -> None:
        weights, calibration = context.require_weights(), context.require_calibration()
        for unreadable in find_unreadable(op):
            context.refuse(unreadable.op, unreadable.reason, self.pass_name)
        # all factors are those of the calibrated model
        layers = find_moe_layers(op)
        plans = [(layer, self._factors(layer, calibration.sample(layer), weights, context)) for layer in layers]
        for layer, factors in plans:
            if factors is None or bool((factors == 1).all()):
                continue
            problem = fold_factors(layer, factors, weights)
            if problem is not None:
                context.refuse(layer.experts, problem, self.pass_name)
                continue
            context.count(self.smoothed)
            low, high = float(factors.min()), float(factors.max())
            context.remark(layer.experts, f"channels divided by {low:g} to {high:g}")
            if context.module is not None:
                context.module.calibration = None

    def _factors(
        self, layer: MoeLayer, sample: LayerSample, weights: WeightContext, context: PassContext
    ) -> torch.Tensor | None:
        """One factor per channel, float64 [H], powers of two; None where the experts cannot be read."""
        wishes = []
        for number in range(layer.expert_count):
            try:
                expert = load_expert(layer, weights, number)
            except UnreadableExpertError as error:
                context.refuse(layer.experts, error.message, self.pass_name)
                return None
            rows, _ = sample.chosen(layer, number)
            if not isinstance(expert, FeedForward) or not len(rows):
                continue
            sides = [side for side in (Side.GATE, Side.UP) if projection(expert, side) is not None]
            matrix = torch.cat([dense_matrix(expert, side) for side in sides])
            wishes.append(self._wish(sample.x[rows], matrix))
        if self.router and len(sample):
            found = linear_map(layer.router)
            if found is not None:
                wishes.append(self._wish(sample.router_input, load_matrix(found.weight, weights)))
        if not wishes:
            return None
        joined = torch.stack(wishes)
        factors = joined.amax(0) if self.aggregate is Aggregate.MAX else joined.mean(0)
        factors = factors / factors.log().mean().exp()
        return torch.exp2(factors.log2().round())

    def _wish(self, rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """[H]; 1 for a channel without activations or without weights."""
        active, weight = rows.double().abs().amax(0), matrix.double().abs().amax(0)
        if not bool((active.isfinite() & weight.isfinite()).all()):
            raise UsageError("activations or weights of a layer are not finite", hint="the checkpoint is damaged")
        wish = active.pow(self.alpha) / weight.clamp_min(torch.finfo(torch.float64).tiny).pow(1 - self.alpha)
        return torch.where((active > 0) & (weight > 0), wish, 1.0)


def fold_factors(layer: MoeLayer, factors: torch.Tensor, weights: WeightContext) -> str | None:
    """Divides the norm in front of a layer and multiplies what reads it; the reason where that is not possible."""
    value = layer.experts.x
    while value.defining_op is not None and value.defining_op.name in _VIEWS:
        value = value.defining_op.operands[0]
    norm = value.defining_op
    if not isinstance(norm, RMSNormOp | LayerNormOp):
        return "its input is not what a norm gives"
    if any(not isinstance(operand.defining_op, WeightOp) for operand in norm.operands[1:]):
        return "the weight of its norm is computed"
    maps: list[LinearMap] = []
    try:
        for member, user in _sinks(value):
            if shape(member)[-1] != len(factors):
                return f"{user.name} reads the channels of its norm in another shape"
            maps += readers_of(member, user)
    except NotLinearError as error:
        return str(error)
    change = Change(lambda matrix: matrix * factors, lambda matrix, bias: bias, by_rows=True)
    for found in maps:
        current = linear_map(found.op)
        assert current is not None
        rewrite_map(current, change, weights)
    _divide(norm, factors, weights)
    return None


def _sinks(value: Value) -> list[tuple[Value, Operation]]:
    """(value, operation) for everything that reads a value, through views of it."""
    found: list[tuple[Value, Operation]] = []
    for user in dict.fromkeys(value.users):
        found += _sinks(user.results[0]) if user.name in _VIEWS else [(value, user)]
    return found


def _divide(norm: RMSNormOp | LayerNormOp, factors: torch.Tensor, weights: WeightContext) -> None:
    """Divides weight and bias of a norm."""
    offset = norm.offset if isinstance(norm, RMSNormOp) else 0.0
    old = _vector(norm.weight, weights)
    scale = (torch.ones_like(factors) if old is None else old + offset) / factors
    new: list[Value | None] = [_stored(norm, "weight", norm.weight, scale - (0.0 if old is None else offset), weights)]
    made: RMSNormOp | LayerNormOp
    if isinstance(norm, LayerNormOp):
        shift = _vector(norm.bias, weights)
        new.append(None if shift is None else _stored(norm, "bias", norm.bias, shift / factors, weights))
        made = LayerNormOp(norm.x, *new, location=norm.location, epsilon=norm.epsilon)
    else:
        kept = 0.0 if old is None else offset
        made = RMSNormOp(norm.x, *new, location=norm.location, offset=kept, epsilon=norm.epsilon)
    made.insert_before(norm)
    norm.results[0].replace_all_uses_with(made.results[0])
    erase_unused(norm)


def _vector(value: Value | None, weights: WeightContext) -> torch.Tensor | None:
    if value is None:
        return None
    assert isinstance(value.defining_op, WeightOp)
    return weights.load(weights.unrounded(value.defining_op.source)).double()


def _stored(norm: Operation, what: str, old: Value | None, numbers: torch.Tensor, weights: WeightContext) -> Value:
    name, dtype = f"{norm.location.name or 'norm'}.{what}", tensor(norm.results[0]).dtype
    if old is not None and isinstance(old.defining_op, WeightOp):
        name, dtype = old.defining_op.weight_name, tensor(old).dtype
    parts: Sequence[torch.Tensor] = [numbers]
    source = store_unrounded(weights, TensorSpec(tuple(numbers.shape), torch.float64), parts, dtype)
    return new_weight(norm, name, source, tuple(numbers.shape), dtype)
