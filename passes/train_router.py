"""Routers that are trained layer by layer, on what the experts give to captured rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from moec.calibration.sample import LayerSample
from moec.dialects.moe import Select
from moec.errors import UsageError
from moec.experts import MoeLayer, find_moe_layers
from moec.experts.router_source import is_frozen, replace_router_weights
from moec.ir import Operation
from moec.passes.routing.labels import Labels, experts_with_neurons, labels
from moec.passes.routing.router_fit import FitSettings, Loss, RouterFit, RouterRows, fit_router
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass

_HELD_OUT_SHARE = 5


@register_pass("train-router")
@dataclass(frozen=True)
class TrainRouter(Pass):
    """Trains every router on the calibration sample towards labels that the experts' outputs give.

    1. `labels=activation`: what each expert gives, sum |phi_i(x)| ||D_i|| over its neurons, relative to the best one
       (MoEfication). `labels=nearest`: one for the k experts with the least squared distance from y k / E, y the output
       of the whole layer (FactorLLM's prior-approximate labels). `labels=best-subset`: one for the k experts that,
       chosen one after the other, leave the least of y. `labels=overlap`: the share of the most active neurons that an
       expert has (Read-ME). A router that several layers follow gets the mean of their labels.
    2. `loss`: `bce` of each output alone (MoEfication), `kl`, sum p log(p / q) of softmaxes of logits and labels
       (FactorLLM), `ce` with the best label, smoothed by a half, and a quarter of it soft (Read-ME), or `focal`, the
       same with rows weighed by (1 - p)^2 and by how rare their label is (Dr.LLM). `balance` adds E sum f_e p_e.
    3. Every fifth sequence is held out. The weights with the least loss there count, those from before included, so
       nothing gets worse there; a remark gives both losses.

    Weights in front of the router, such as those of `init-router{kind=hidden-layer}`, are trained, too. Frozen routers
    are left alone. It belongs behind `init-router`.

    MoEfication (Zhang et al. 2022), FactorLLM (arXiv 2408.11855), Read-ME.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    changed = Statistic("routers that became better")
    kept = Statistic("routers that stayed")
    labels: Labels = option("what the router should say", Labels.ACTIVATION)
    loss: Loss = option("how far it is from that", Loss.BCE)
    k: int = option("labels of k experts: how many; 0 is what tokens choose now", 0)
    epochs: int = option("passes through the rows", 30)
    batch: int = option("rows in one step", 512)
    rate: float = option("step size of Adam; it falls linearly to a tenth", 1e-2)
    balance: float = option("weight of the loss that spreads rows over experts", 0.0)

    def __post_init__(self) -> None:
        if self.k < 0 or self.epochs < 1 or self.batch < 1:
            raise ValueError("epochs and batch must be at least 1, k must not be negative")
        if not 0 < self.rate < 1 or self.balance < 0:
            raise ValueError("rate must be within 0 and 1, balance must not be negative")

    def run(self, op: Operation, context: PassContext) -> None:
        weights = context.require_weights()
        readers: dict[Operation, list[MoeLayer]] = {}
        for layer in find_moe_layers(op):
            readers.setdefault(layer.router, []).append(layer)
        for layers in readers.values():
            layer = layers[0]
            if is_frozen(layer):
                context.refuse(layer.router, "its router is frozen", self.pass_name)
                continue
            if any(sorted(reader.stored) != list(range(reader.outputs)) for reader in layers):
                context.refuse(layer.experts, "router outputs share experts, or have none", self.pass_name)
                continue
            sample = context.require_calibration().sample(layer)
            rows = RouterRows(layer, weights, sample)
            fit = self._fit(layers, rows, sample, context)
            features = rows.features(fit.weights) if fit.weights else None
            replace_router_weights(layer, weights, fit.weights)
            if features is not None and context.module is not None:
                # for the passes behind this one
                calibration = context.require_calibration()
                context.module.calibration = calibration.with_router_inputs(
                    {reader.name: features for reader in layers}
                )
            context.count(self.changed if fit.weights else self.kept)
            context.remark(layer.route, f"held-out {self.loss.value} {fit.before:.4f} -> {fit.after:.4f}")

    def _fit(
        self, layers: Sequence[MoeLayer], rows: RouterRows, sample: LayerSample, context: PassContext
    ) -> RouterFit:
        layer = layers[0]
        held_out = sample.sequence % _HELD_OUT_SHARE == 0
        if bool(held_out.all()) or not bool(held_out.any()):
            raise UsageError(
                "the calibration has too few sequences to hold some out",
                where=layer.name,
                hint=f"give {_HELD_OUT_SHARE} or more",
            )
        k = self._choices(layer)
        wanted = torch.stack([self._labels(reader, k, context) for reader in layers]).mean(0)
        seed = context.seed * 1_000_003 + layer.index
        settings = FitSettings(self.loss, self.epochs, self.batch, self.rate, self.balance, k, seed)
        return fit_router(rows, wanted, held_out, settings)

    def _labels(self, layer: MoeLayer, k: int, context: PassContext) -> torch.Tensor:
        """What a layer wants of its router, float32 [n, R]."""
        sample = context.require_calibration().sample(layer)
        experts = experts_with_neurons(layer, context.require_weights())
        # labels are by stored expert, logits by output
        return labels(self.labels, experts, sample.x, sample.y, k)[:, torch.tensor(layer.stored)]

    def _choices(self, layer: MoeLayer) -> int:
        """k of labels."""
        if self.k > layer.outputs:
            raise UsageError(
                f"{self.k} experts cannot be chosen among {layer.outputs}", where=layer.name, hint="choose a smaller k"
            )
        routing = layer.route.routing
        chosen = routing.k if routing.select in (Select.TOPK, Select.PER_GROUP_TOPK) else layer.outputs
        k = self.k or chosen
        if k == layer.outputs and self.labels.counts_experts:
            raise UsageError(
                f"tokens choose all {k} experts, so every label would be one",
                where=layer.name,
                hint="give k, or put set-routing{k=...} in front",
            )
        return int(k)
