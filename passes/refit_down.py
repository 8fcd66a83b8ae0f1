"""Refitting of the last products of experts to the outputs of the original model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from moec.experts import UnreadableExpertError, find_moe_layers, find_unreadable, replace_experts
from moec.ir import Operation
from moec.passes.merging.layer_fit import FitScope, FitSettings, fit_layer
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass


@register_pass("refit-down")
@dataclass(frozen=True)
class RefitDown(Pass):
    """Fits the down projections of experts by least squares to the original outputs on the calibration tokens.

    Runs after passes that drop, merge, redirect, narrow or factor experts, and takes back a good part of what they
    cost: half and more after merging (MergeMoE, arXiv 2510.14436, refits merged experts alone). Of factored
    projections the left factor is fitted, of shared ones none; protected experts stay.

    1. A ridge pulls towards the weights as they are: nothing changes where the layer is exact or an expert unused.
       It also lets few tokens do: of several ridges, the one with the least error on held-out tokens is taken.
    2. `joint` solves for all experts of a layer at once, `expert` for one after the other, in `sweeps`; `auto` is
       joint unless that takes too much memory.
    3. A guard fits without a share `hold-out` of the sequences, and rejects the fit of a layer whose error on those
       would not fall. Less than `least-tokens` tokens are not enough for the guard itself.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    fitted = Statistic("experts fitted")
    layers = Statistic("layers fitted")
    rejected = Statistic("layers whose fit was rejected")
    exact = Statistic("layers without an error to fit")

    scope: FitScope = option("which experts of a layer are fitted at once", FitScope.AUTO)
    ridge: tuple[float, ...] = option(
        "weights of the change against the error; the best one is taken", (1e-3, 1e-2, 1e-1)
    )
    hold_out: float = option("share of the calibration sequences that the fit is checked on", 0.2)
    least_tokens: int = option("rows of the sample without which nothing is fitted", 2048)
    balance: bool = option("tokens with outputs above the median count less, as norms will shrink them", True)
    sweeps: int = option("times that `expert` goes over the experts of a layer", 3)

    def __post_init__(self) -> None:
        if not self.ridge or not all(0 < ridge < math.inf for ridge in self.ridge):
            raise ValueError("each ridge must be above 0")
        if not 0 < self.hold_out < 1:
            raise ValueError(f"hold-out {self.hold_out:g} is not within 0 < hold-out < 1")
        if self.sweeps < 1:
            raise ValueError("sweeps must be at least 1")

    def run(self, op: Operation, context: PassContext) -> None:
        calibration, weights = context.require_calibration(), context.require_weights()
        settings = FitSettings(self.scope, self.ridge, self.hold_out, self.least_tokens, self.sweeps, self.balance)
        for unreadable in find_unreadable(op):
            context.refuse(unreadable.op, unreadable.reason, self.pass_name)
        for layer in find_moe_layers(op):
            generator = torch.Generator().manual_seed(context.seed)
            try:
                fit = fit_layer(layer, calibration.sample(layer), weights, settings, generator)
            except UnreadableExpertError as error:
                context.refuse(layer.experts, error.message, self.pass_name)
                continue
            if fit.exact:
                context.count(self.exact)
            elif fit.problem:
                context.count(self.rejected)
                # whoever packed the last products has refitted them, or chose not to: nothing that a user should mend
                tell = context.remark if fit.packed else context.warn
                tell(layer.experts, f"not refitted: {fit.problem}")
            else:
                context.count(self.layers)
                context.count(self.fitted, len(fit.experts))
                change = f"{fit.before:.2%} of the squared output -> {fit.after:.2%}"
                context.remark(layer.experts, f"{len(fit.experts)} experts refitted; error on held-out tokens {change}")
                replace_experts(layer, weights, fit.experts)
