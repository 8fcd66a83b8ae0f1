"""How many experts a token gets, and how what they give is added up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar

import torch

from moec.calibration.sample import LayerSample
from moec.dialects.moe import Normalize, Select, WeightFrom
from moec.errors import UsageError
from moec.experts import MoeLayer, find_moe_layers, replace_routing, run_layer
from moec.ir import Operation
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass


class Combine(Enum):
    """What the gates of the chosen experts are."""

    KEEP = "keep"  # as they are
    ONE = "one"  # each one
    SCORE = "score"  # the router's score
    SOFTMAX = "softmax"  # the softmax of the chosen logits


class Scale(Enum):
    """What the sum of a layer's experts is multiplied with."""

    KEEP = "keep"
    CONSTANT = "constant"  # the option `factor`
    CALIBRATED = "calibrated"  # what brings the layer nearest to what it gave when it was calibrated


@register_pass("set-routing")
@dataclass(frozen=True)
class SetRouting(Pass):
    """Sets how many experts a token chooses, how their outputs are weighted, and the scale of their sum.

    `scale=calibrated` takes the least-squares scale of each layer, sum <y, y'> / sum ||y'||^2 over the calibration
    sample, where y is the layer's output when it was calibrated and y' what it gives with these choices. It makes up
    for what the experts that are left out would give, and is 1 where none is. It belongs behind a calibration of the
    model as it was before, such as `factorize,calibrate,init-router,set-routing{k=2 scale=calibrated}`.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    changed = Statistic("routes")
    k: int = option("experts for each token; 0 leaves their number", 0)
    combine: Combine = option("what gates are", Combine.KEEP)
    scale: Scale = option("what the sum is multiplied with", Scale.KEEP)
    factor: float = option("the factor of scale=constant", 1.0)

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ValueError("k must not be negative")
        if not 0 < self.factor < float("inf"):
            raise ValueError("factor must be a positive number")

    def run(self, op: Operation, context: PassContext) -> None:
        for layer in find_moe_layers(op):
            routing = layer.route.routing
            if self.k and routing.select not in (Select.TOPK, Select.PER_GROUP_TOPK):
                context.refuse(
                    layer.route, f"its router selects by {routing.select.value}, not a number", self.pass_name
                )
                continue
            if self.k > layer.outputs:
                raise UsageError(
                    f"{self.k} experts cannot be chosen among {layer.outputs}", where=layer.name, hint="choose fewer"
                )
            routing = replace(routing, k=self.k or routing.k)
            match self.combine:
                case Combine.ONE:
                    routing = replace(routing, weight_from=WeightFrom.ONE, normalize=Normalize.NONE)
                case Combine.SCORE:
                    routing = replace(routing, weight_from=WeightFrom.SCORE)
                case Combine.SOFTMAX:
                    routing = replace(routing, weight_from=WeightFrom.SOFTMAX_SELECTED, normalize=Normalize.NONE)
            if self.scale is Scale.CONSTANT:
                routing = replace(routing, scale=self.factor)
            layer = replace_routing(layer, routing)
            if self.scale is Scale.CALIBRATED:
                factor = _best_scale(layer, context.require_calibration().sample(layer))
                layer = replace_routing(layer, replace(routing, scale=routing.scale * factor))
                context.remark(layer.route, f"the sum of the experts is multiplied by {layer.route.routing.scale:.4f}")
            context.count(self.changed)


def _best_scale(layer: MoeLayer, sample: LayerSample) -> float:
    """The factor of the layer's output that brings it nearest to what it was; 1 where it gives nothing."""
    y = run_layer(layer, sample.weights, sample.x, sample.router_input).y
    assert y is not None
    y, before = y.double(), sample.y.double()
    energy = float(y.square().sum())
    factor = float((y * before).sum()) / energy if energy > 0 else 1.0
    return factor if torch.isfinite(torch.tensor(factor)) and factor > 0 else 1.0
