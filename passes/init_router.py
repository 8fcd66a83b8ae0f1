"""Weights for routers, found without training."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch

from moec.errors import UsageError
from moec.experts import FeedForward, MoeLayer, find_moe_layers, load_expert, replace_router
from moec.ir import Operation
from moec.passes.router_init.solutions import expert_importance, least_squares, row_centroids, weight_centroids
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass

_ROWS_PER_UNKNOWN = 32


class RouterKind(Enum):
    """Where router weights come from."""

    RANDOM = "random"  # normal numbers of standard deviation `deviation`
    WEIGHT_CENTROID = "weight-centroid"  # the mean direction of the expert's gate rows (MoEfication)
    ACTIVATION_CENTROID = "activation-centroid"  # the mean row of the tokens that the expert serves best
    LEAST_SQUARES = "least-squares"  # the linear map nearest to what each expert gives to each token


@register_pass("init-router")
@dataclass(frozen=True)
class InitRouter(Pass):
    """Gives every router a weight that ranks experts by how much they give to a token, in closed form.

    1. What expert e gives to row x is the sum over its neurons of |phi_i(x)| ||D_i||.
    2. `least-squares` fits a linear map with a bias to that on the calibration sample; it needs 32 rows for each of its
       hidden size + 1 unknowns to be reliable, and says where there are fewer.
    3. `random` and `weight-centroid` need no calibration. The bias goes into the choice, and has no influence on gates
       where they are one.

    Only layers whose outputs each name an expert of their own are changed. Routers of a trained model are replaced,
    too, so the pass belongs behind `factorize`.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    changed = Statistic("routers")
    kind: RouterKind = option("where the weights come from", RouterKind.LEAST_SQUARES)
    deviation: float = option("standard deviation of random weights", 0.02)
    ridge: float = option("least squares: damping as a share of the mean squared input", 1e-4)

    def __post_init__(self) -> None:
        if self.deviation <= 0 or self.ridge < 0:
            raise ValueError("deviation must be positive, ridge must not be negative")

    def run(self, op: Operation, context: PassContext) -> None:
        weights = context.require_weights()
        for layer in find_moe_layers(op):
            if sorted(layer.stored) != list(range(layer.outputs)):
                context.refuse(layer.experts, "router outputs share experts, or have none", self.pass_name)
                continue
            weight, bias = self._solve(layer, context)
            if not bool(weight.isfinite().all()):
                raise UsageError("the router would not be finite numbers", where=layer.name)
            # solutions are by stored expert, rows of the router by output
            order = torch.tensor(layer.stored)
            replace_router(layer, weights, weight[order], None if bias is None else bias[order])
            context.count(self.changed)

    def _solve(self, layer: MoeLayer, context: PassContext) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [E, H] and bias [E] by stored expert."""
        if self.kind is RouterKind.RANDOM:
            generator = torch.Generator().manual_seed(context.seed * 1_000_003 + layer.index)
            return torch.randn(layer.expert_count, layer.hidden_size, generator=generator) * self.deviation, None
        experts = []
        for number in range(layer.expert_count):
            expert = load_expert(layer, context.require_weights(), number)
            if not isinstance(expert, FeedForward):
                raise UsageError(f"stored expert {number} has no neurons to rank it by", where=layer.name)
            experts.append(expert)
        if self.kind is RouterKind.WEIGHT_CENTROID:
            return weight_centroids(experts), None
        sample = context.require_calibration().sample(layer)
        importance = expert_importance(experts, sample.x)
        if self.kind is RouterKind.ACTIVATION_CENTROID:
            return row_centroids(sample.router_input, importance)
        needed = _ROWS_PER_UNKNOWN * (layer.hidden_size + 1)
        if len(sample) < needed:
            context.remark(
                layer.route,
                f"{len(sample)} rows for {layer.hidden_size + 1} unknowns of each expert; give {needed} or more: "
                f"calibrate{{sequences=... length=... reservoir={needed}}}",
            )
        return least_squares(sample.router_input, importance, self.ridge)
