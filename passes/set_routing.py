"""How many experts a token gets, how what they give is added up, and whose choice it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar

import torch

from moec.calibration.sample import LayerSample
from moec.dialects.moe import Normalize, Routing, Score, Select, WeightFrom
from moec.errors import UsageError
from moec.experts import MoeLayer, find_moe_layers, replace_routing, run_layer
from moec.experts.router_source import feed_router, follow_router
from moec.ir import Operation, TensorType
from moec.passes.routing.sequence_mean import sequence_mean, sequence_means, sequence_obstacle
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass


class Selection(Enum):
    """Which experts a token gets."""

    KEEP = "keep"  # as the model says
    TOP_K = "top-k"  # the best k
    TOP_P = "top-p"  # the best until their scores reach p
    ENTROPY = "entropy"  # as top-p, and all where the scores are nearly equal (DynMoLE)
    THRESHOLD = "threshold"  # those whose score exceeds `threshold`
    ALL = "all"


class Combine(Enum):
    """What the gates of the chosen experts are."""

    KEEP = "keep"  # as they are
    ONE = "one"  # each one
    ONE_PLUS = "one-plus"  # 1 + u score (CMoE)
    SCORE = "score"  # the router's score
    SCORE_SHARE = "score-share"  # the score divided by the sum over the chosen ones
    SOFTMAX = "softmax"  # the softmax of the chosen logits


class Scale(Enum):
    """What the sum of a layer's experts is multiplied with."""

    KEEP = "keep"
    CONSTANT = "constant"  # the option `factor`
    CALIBRATED = "calibrated"  # what brings the layer nearest to what it gave when it was calibrated


class Scope(Enum):
    """What shares one choice."""

    TOKEN = "token"  # nothing: each token chooses in each layer
    SEQUENCE = "sequence"  # the tokens of a sequence, by the mean of what the router would read of each
    MODEL = "model"  # the layers, by the logits of the first one


@register_pass("set-routing")
@dataclass(frozen=True)
class SetRouting(Pass):
    """Sets how many experts a token chooses, how their outputs are weighted, and the scale of their sum.

    1. `select` says which experts: the best k; the best until their softmax scores reach p, the one that crosses it
       included or (`crossing=false`) left out, at least `k_min`; the same, but all where the Tsallis entropy of order
       `order` exceeds the share `unsure` of its largest value, (1 - E^(1 - order)) / (order - 1), as in DynMoLE with
       order 1.1, unsure 0.9, p 0.75, k_min 2 and crossing=false; those above a threshold; or all.
    2. `combine` says how: gates one, scores as they are or as shares, a softmax, or 1 + u score (CMoE).
    3. `scale=calibrated` takes the least-squares scale of each layer, sum <y, y'> / sum ||y'||^2 over the calibration
       sample, where y is the layer's output when it was calibrated and y' what it gives with these choices. It makes up
       for what the experts that are left out would give, and is 1 where none is. It belongs behind a calibration of the
       model as it was before, such as `factorize,calibrate,init-router,set-routing{k=2 scale=calibrated}`.
    4. `spread` divides logits so that their standard deviation over the calibration sample is this number. Experts of a
       dense block give nearest to what it gave with equal gates, and the softmax of logits of a small spread nearly is
       that, in a form that Mixtral and its like have: `combine=softmax spread=0.004`. Where a token gets all experts,
       gates are one instead, and the layer computes what the block did.
       Behind a calibration the report says how choices spread over experts, and which ones nothing chose.
    5. `scope=sequence` gives all tokens of a sequence the same experts. A decoder chooses before it knows the sequence,
       so only encoders can have it. `scope=model` lets all layers choose by the logits of the first one.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    changed = Statistic("routes")
    unused = Statistic("experts that no token of the calibration text chose")
    select: Selection = option("which experts a token gets; k alone means top-k", Selection.KEEP)
    k: int = option("experts for each token; 0 leaves their number", 0)
    share: float = option("experts for each token as a share of the layer's, one at least; 0 leaves their number", 0.0)
    p: float = option("top-p and entropy: the scores to reach", 0.75)
    k_min: int = option("top-p and entropy: experts for each token at least", 1)
    k_max: int = option("top-p: experts for each token at most; 0 is all", 0)
    crossing: bool = option("top-p and entropy: take the expert that crosses p", True)
    order: float = option("entropy: its order; 1 is Shannon's", 1.1)
    unsure: float = option("entropy: the share of the largest entropy above which a token gets all experts", 0.9)
    threshold: float = option("threshold: the score to exceed", 0.0)
    combine: Combine = option("what gates are", Combine.KEEP)
    u: float = option("combine=one-plus: the weight of the score", 0.0)
    spread: float = option("combine=softmax: standard deviation of the logits; 0 leaves them as they are", 0.0)
    scale: Scale = option("what the sum is multiplied with", Scale.KEEP)
    factor: float = option("the factor of scale=constant", 1.0)
    scope: Scope = option("what shares one choice", Scope.TOKEN)

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ValueError("k must not be negative")
        if not 0 <= self.share <= 1 or (self.k and self.share):
            raise ValueError("share is at most 1, and excludes k")
        if self.select is Selection.TOP_K and not self.k and not self.share:
            raise ValueError("top-k needs k or share")
        if (self.k or self.share) and self.select not in (Selection.KEEP, Selection.TOP_K):
            raise ValueError(f"k has no meaning for {self.select.value}, which has k_min and k_max")
        if not 0 < self.p <= 1:
            raise ValueError("p must be above 0 and at most 1")
        if self.order <= 0 or self.unsure < 0:
            raise ValueError("order must be positive, unsure must not be negative")
        if not 0 < self.factor < float("inf"):
            raise ValueError("factor must be a positive number")
        if self.u and self.combine is not Combine.ONE_PLUS:
            raise ValueError("u is for combine=one-plus")
        if self.spread < 0 or (self.spread and self.combine is not Combine.SOFTMAX):
            raise ValueError("spread is for combine=softmax, and not negative")

    def run(self, op: Operation, context: PassContext) -> None:
        layers = find_moe_layers(op)
        if self.scope is Scope.SEQUENCE:
            layers = self._by_sequence(op, layers, context)
        elif self.scope is Scope.MODEL:
            layers = self._by_model(layers, context)
        for layer in layers:
            routing = self._combined(self._selected(layer, context))
            if self.spread:
                routing = _with_spread(routing, layer, context.require_calibration().sample(layer), self.spread)
            layer = replace_routing(layer, routing)
            if self.scale is Scale.CALIBRATED:
                factor = _best_scale(layer, context.require_calibration().sample(layer))
                layer = replace_routing(layer, _scaled(routing, factor))
                context.remark(layer.route, f"the sum of the experts is multiplied by {_scale_of(layer):.4f}")
            self._tell_use(layer, context)
            context.count(self.changed)

    def _tell_use(self, layer: MoeLayer, context: PassContext) -> None:
        """How choices spread over experts on the calibration text, where there is one and tokens have a choice."""
        sample = _known_sample(layer, context)
        if sample is None or layer.expert_count < 2 or layer.route.routing.select is Select.ALL:
            return
        read = layer.router.tensor("input").type
        if not isinstance(read, TensorType) or read.shape[-1] != sample.router_input.shape[-1]:
            return  # a pass between put something else in front of the router
        chosen = sample.route(layer).stored_ids
        share = torch.bincount(chosen[chosen >= 0], minlength=layer.expert_count).double()
        share /= share.sum().clamp(min=1)
        evenness = float(torch.special.entr(share).sum() / math.log(layer.expert_count))
        never = ", ".join(map(str, (share == 0).nonzero()[:, 0].tolist()))
        context.count(self.unused, int((share == 0).sum()))
        context.remark(
            layer.route,
            f"experts get {float(share.min()):.1%} to {float(share.max()):.1%} of the choices on the calibration text, "
            f"{evenness:.1%} of the entropy of equal shares" + (f"; none chose {never}" if never else ""),
        )

    def _selected(self, layer: MoeLayer, context: PassContext) -> Routing:
        routing: Routing = layer.route.routing
        experts = layer.outputs
        k = max(1, round(self.share * experts)) if self.share else self.k
        for name, number in (("k", k), ("k_min", self.k_min), ("k_max", self.k_max)):
            if number > experts:
                raise UsageError(
                    f"{number} experts cannot be chosen among {experts}",
                    where=layer.name,
                    hint=f"choose a smaller {name}",
                )
        plain = replace(routing, k=0, k_max=0, k_min=1, rank_offset=0, p=0.0, take_crossing=True)
        match self.select:
            case Selection.KEEP if not k:
                return routing
            case Selection.KEEP | Selection.TOP_K:
                if routing.select is Select.PER_GROUP_TOPK:
                    return replace(routing, k=k)
                if self.select is Selection.KEEP and routing.select not in (Select.TOPK, Select.ALL):
                    context.refuse(
                        layer.route, f"its router selects by {routing.select.value}, not a number", self.pass_name
                    )
                    return routing
                return replace(plain, select=Select.TOPK, k=k)
            case Selection.TOP_P | Selection.ENTROPY:
                if routing.score is not Score.SOFTMAX:
                    raise UsageError(
                        f"the scores of this router come from {routing.score.value}, and sum up to no share",
                        where=layer.name,
                        hint=f"{self.select.value} needs softmax scores; choose top-k or threshold",
                    )
                prefix = replace(plain, p=self.p, k_min=self.k_min, k_max=self.k_max, take_crossing=self.crossing)
                if self.select is Selection.TOP_P:
                    return replace(prefix, select=Select.TOPP)
                limit = self.unsure * _largest_entropy(experts, self.order)
                return replace(prefix, select=Select.ENTROPY, k_max=0, entropy_q=self.order, entropy_threshold=limit)
            case Selection.THRESHOLD:
                return replace(plain, select=Select.THRESHOLD, p=self.threshold)
            case Selection.ALL:
                return replace(plain, select=Select.ALL)

    def _combined(self, routing: Routing) -> Routing:
        before = _output_scale(routing)
        match self.combine:
            case Combine.ONE:
                routing = replace(routing, weight_from=WeightFrom.ONE, normalize=Normalize.NONE)
            case Combine.ONE_PLUS:
                source = WeightFrom.SCORE if self.u else WeightFrom.ONE
                routing = replace(routing, weight_from=source, normalize=Normalize.NONE)
            case Combine.SCORE:
                routing = replace(routing, weight_from=WeightFrom.SCORE, normalize=Normalize.NONE)
            case Combine.SCORE_SHARE:
                routing = replace(routing, weight_from=WeightFrom.SCORE, normalize=Normalize.SUM)
            case Combine.SOFTMAX:
                routing = replace(routing, weight_from=WeightFrom.SOFTMAX_SELECTED, normalize=Normalize.NONE)
        if self.combine is Combine.ONE_PLUS and self.u:
            routing = replace(routing, scale=self.u * before, offset=before)
        elif self.combine is not Combine.KEEP:
            routing = replace(routing, scale=before, offset=0.0)
        return _scaled(routing, self.factor / before) if self.scale is Scale.CONSTANT else routing

    def _by_sequence(self, op: Operation, layers: Sequence[MoeLayer], context: PassContext) -> tuple[MoeLayer, ...]:
        """Routers that read the mean over each sequence, padding left out."""
        obstacle = sequence_obstacle(op, context.module)
        if obstacle:
            raise UsageError(f"one choice for a sequence: {obstacle}", hint="use scope=token or scope=model")
        changed = []
        for layer in layers:
            changed.append(feed_router(layer, context.require_weights(), sequence_mean(op, layer)))
            sample = _known_sample(layer, context)
            if sample is not None:
                _tell_calibration(layer, sequence_means(sample), context)
        return tuple(changed)

    def _by_model(self, layers: Sequence[MoeLayer], context: PassContext) -> tuple[MoeLayer, ...]:
        """Layers that choose by the logits of the first one."""
        changed = list(layers[:1])
        for layer in layers[1:]:
            changed.append(follow_router(layer, layers[0]))
            sample = _known_sample(layers[0], context)
            if sample is not None:
                _tell_calibration(layer, sample.router_input, context)
        return tuple(changed)


def _known_sample(layer: MoeLayer, context: PassContext) -> LayerSample | None:
    """The calibration's sample of a layer, None where there is none."""
    calibration = None if context.module is None else context.module.calibration
    return calibration.sample(layer) if calibration is not None and calibration.knows(layer) else None


def _tell_calibration(layer: MoeLayer, rows: torch.Tensor, context: PassContext) -> None:
    """What the router reads now of the sample, for the passes behind this one."""
    module = context.module
    if module is not None and module.calibration is not None and module.calibration.knows(layer):
        module.calibration = module.calibration.with_router_inputs({layer.name: rows})


def _largest_entropy(experts: int, order: float) -> float:
    """The Tsallis entropy of equal scores in nats."""
    if abs(order - 1) < 1e-6:
        return float(torch.tensor(experts, dtype=torch.float64).log())
    return float((1 - experts ** (1 - order)) / (order - 1))


def _output_scale(routing: Routing) -> float:
    """What the sum of the experts is multiplied with: of gates rho (1 + u score) it is rho."""
    return routing.offset or routing.scale


def _scale_of(layer: MoeLayer) -> float:
    return _output_scale(layer.route.routing)


def _scaled(routing: Routing, factor: float) -> Routing:
    return replace(routing, scale=routing.scale * factor, offset=routing.offset * factor)


def _with_spread(routing: Routing, layer: MoeLayer, sample: LayerSample, spread: float) -> Routing:
    """Gates from logits of a standard deviation on the sample, or gates of one where all experts are chosen."""
    if routing.select is Select.ALL or routing.k == layer.outputs:
        return replace(routing, weight_from=WeightFrom.ONE)
    logits = sample.route(layer).logits.double()
    # what the logits of a row have in common changes no softmax
    deviation = float((logits - logits.mean(1, keepdim=True)).std())
    return replace(routing, temperature=deviation / spread) if deviation > 0 else routing


def _best_scale(layer: MoeLayer, sample: LayerSample) -> float:
    """The factor of the layer's output that brings it nearest to what it was; 1 where it gives nothing."""
    y = run_layer(layer, sample.weights, sample.x, sample.router_input).y
    assert y is not None
    y, before = y.double(), sample.y.double()
    energy = float(y.square().sum())
    factor = float((y * before).sum()) / energy if energy > 0 else 1.0
    return factor if torch.isfinite(torch.tensor(factor)) and factor > 0 else 1.0
