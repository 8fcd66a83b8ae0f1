"""Protection of experts whose outputs carry massive activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moec.experts import find_moe_layers, protect_experts
from moec.ir import Operation
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass


@register_pass("protect-super-experts")
@dataclass(frozen=True)
class ProtectSuperExperts(Pass):
    """Marks the few experts whose largest output stands far out, so that no later pass changes or drops them.

    An expert is marked where the largest absolute value of its outputs over all tokens is above the given percentile of
    all experts of the model and above a share of the largest one, and where its layer is not among the last
    (Super Experts, arXiv 2507.23279, section 3: 99.5, a tenth, the first three quarters).
    """

    claim: ClassVar[Claim] = Claim.EXACT
    marked = Statistic("experts protected")
    percentile: float = option("percentile of the largest outputs of all experts, 0 to 100", 99.5)
    share: float = option("least share of the largest output of the model", 0.1)
    first: float = option("share of the layers, from the first on, in which experts are looked for", 0.75)

    def __post_init__(self) -> None:
        if not 0 <= self.percentile <= 100 or not 0 <= self.share <= 1 or not 0 <= self.first <= 1:
            raise ValueError("percentile is within 0 to 100, share and first are within 0 to 1")

    def run(self, op: Operation, context: PassContext) -> None:
        calibration = context.require_calibration()
        layers = find_moe_layers(op)
        if not layers:
            return
        largest = [calibration.statistics(layer).output_max for layer in layers]
        everything = torch.cat(largest)
        bound = max(float(torch.quantile(everything, self.percentile / 100)), self.share * float(everything.max()))
        for layer, values in list(zip(layers, largest, strict=True))[: round(self.first * len(layers))]:
            found = [expert for expert, value in enumerate(values.tolist()) if value > bound]
            if found:
                protect_experts(layer, found)
                context.count(self.marked, len(found))
                context.remark(layer.experts, f"protects the experts {', '.join(map(str, found))} of {layer.name}")
