"""What a cache of experts would hit on the calibration text: a report, for whoever writes or tunes a runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moec.experts import MoeLayer, find_moe_layers
from moec.experts.run import LayerRun
from moec.ir import Operation
from moec.passes.cache_planning.prediction import next_gate_recall, path_recall
from moec.passes.cache_planning.simulation import Access, CachePlan, Hits, Policy, simulate
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass

# HOBBIT reads an expert in high precision where the gates before it are at most this share of a token's gates
_IMPORTANT = 0.6


@register_pass("plan-cache")
@dataclass(frozen=True)
class PlanCache(Pass):
    """Simulates caches that hold a share of the experts, on the choices of the calibration's rows.

    Rows walk through the layers one after the other, as in decoding. Policies are least recently used, least frequently
    used, and HOBBIT's sum of both, of uses in high precision and of the distance of the layer. Remarks (`--explain`)
    give the hit rate of each, and for every layer but the first how many of its experts two predictors name beforehand:
    its own router on the rows of the layer before (HOBBIT), and a table of which experts follow which (EdgeMoE).
    Nothing is changed; `make-replicas{resident}` goes by the hit rates of each expert under the best policy.
    """

    claim: ClassVar[Claim] = Claim.EXACT
    accesses = Statistic("experts that rows chose")
    capacity: float = option("share of all stored experts that the cache holds, above 0 and at most 1", 0.375)
    rows: int = option("most rows of the calibration to walk through", 512)

    def __post_init__(self) -> None:
        if not 0 < self.capacity <= 1 or self.rows < 2:
            raise ValueError("capacity is above 0 and at most 1, rows are at least 2")

    def run(self, op: Operation, context: PassContext) -> None:
        calibration = context.require_calibration()
        layers = [layer for layer in find_moe_layers(op) if calibration.knows(layer)]
        if not layers:
            return
        samples = [calibration.sample(layer) for layer in layers]
        trace = _trace(layers, [sample.route(layer) for sample, layer in zip(samples, layers, strict=True)], self.rows)
        context.count(self.accesses, len(trace))
        stored = sum(layer.experts.expert_count for layer in layers)
        size = max(1, round(self.capacity * stored))
        simulated = {policy: simulate(trace, policy, size, len(layers)) for policy in Policy}
        rates = [f"{policy.value} {hits.rate:.1%}" for policy, hits in simulated.items()]
        context.remark(layers[0].experts, f"a cache of {size} of {stored} experts hits: {', '.join(rates)}")
        if context.module is not None:
            best = max(Policy, key=lambda policy: simulated[policy].rate)
            context.module.cache_plan = CachePlan(best, size, _by_layer(layers, simulated[best]))
        for number in range(1, len(layers)):
            layer, sample, before = layers[number], samples[number], samples[number - 1]
            by_path = path_recall(
                sample.route(layer).stored_ids,
                before.route(layers[number - 1]).stored_ids,
                layer.experts.expert_count,
                layers[number - 1].experts.expert_count,
            )
            by_gate = next_gate_recall(layer, sample, before)
            text = (
                f"its experts are foreseen by its router one layer before at {by_gate:.1%}, by paths at {by_path:.1%}"
            )
            context.remark(layer.experts, text)


def _by_layer(layers: list[MoeLayer], hits: Hits) -> dict[str, tuple[float, ...]]:
    """The hit rate of every stored expert."""
    return {
        layer.name: tuple(hits.rate_of((number, expert)) for expert in range(layer.expert_count))
        for number, layer in enumerate(layers)
    }


def _trace(layers: list[MoeLayer], runs: list[LayerRun], rows: int) -> list[Access]:
    """The choices of the first rows, row by row and layer by layer, in descending order of gates."""
    found = []
    for row in range(min(rows, len(runs[0].gates))):
        for number in range(len(layers)):
            gates, order = runs[number].gates[row].abs().sort(descending=True, stable=True)
            before = (gates.cumsum(0) - gates) / gates.sum().clamp_min(torch.finfo(gates.dtype).tiny)
            for slot, share in zip(order.tolist(), before.tolist(), strict=True):
                expert = int(runs[number].stored_ids[row, slot])
                if expert >= 0:
                    found.append(Access(number, expert, share <= _IMPORTANT))
    return found
