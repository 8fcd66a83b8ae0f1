"""Whether the experts of a layer come from one dense layer: which family of compression is likely to do better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moec.experts import MoeLayer, find_moe_layers, load_expert
from moec.ir import Operation
from moec.passes.merging.alignment import align, weight_profit
from moec.passes.merging.neurons import NeuronTable, UnmergeableExpertError
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass
from moec.weights.context import WeightContext


@dataclass(frozen=True)
class Ancestry:
    """`cosine`: mean cosine of the weights of two experts of one layer; `identity_rate`: share of the neurons that the
    best alignment with the first expert leaves where they are."""

    cosine: float
    identity_rate: float


@register_pass("expert-ancestry")
@dataclass(frozen=True)
class ExpertAncestry(Pass):
    """Tells related experts from unrelated ones, by their weights alone; it changes nothing and needs no text.

    Experts copied from one dense layer keep similar weights and the order of their neurons while they are trained on;
    experts trained from scratch have neither. Related experts lose less by merging and by a shared base with low-rank
    differences, unrelated ones by pruning neurons and by factors of their own. The verdict is a remark for each layer;
    experts that differ in kind or width are left out.
    """

    claim: ClassVar[Claim] = Claim.EXACT
    related = Statistic("layers with related experts")
    unrelated = Statistic("layers with unrelated experts")
    threshold: float = option("mean cosine above which experts are related", 0.3)

    def run(self, op: Operation, context: PassContext) -> None:
        weights = context.require_weights()
        for layer in find_moe_layers(op):
            try:
                found = ancestry(layer, weights)
            except UnmergeableExpertError as error:
                context.refuse(layer.experts, str(error), self.pass_name)
                continue
            related = found.cosine > self.threshold
            context.count(self.related if related else self.unrelated)
            advice = (
                "related: merging, and a shared base with low-rank differences, usually cost less"
                if related
                else "unrelated: pruning neurons, and factors of each expert's own, usually cost less"
            )
            context.remark(
                layer.experts,
                f"mean cosine of weights {found.cosine:.3f}, {found.identity_rate:.0%} of the neurons in the order of "
                f"the first expert; {advice}",
            )


def ancestry(layer: MoeLayer, weights: WeightContext) -> Ancestry:
    """Compares the stored experts of a layer, two in memory at a time.

    The mean cosine of all pairs comes from the norm of the sum of unit vectors. Raises UnmergeableExpertError where
    fewer than two experts have the kind and width of the first.
    """
    first = NeuronTable.of(load_expert(layer, weights, 0))
    total = torch.zeros_like(first.rows(), dtype=torch.float64)
    count, kept = 0, 0.0
    for number in range(layer.expert_count):
        table = NeuronTable.of(load_expert(layer, weights, number))
        if (table.kind, table.width) != (first.kind, first.width):
            continue
        rows = table.rows().double()
        norm = float(rows.norm())
        if not norm:
            continue
        total += rows / norm
        if number:
            order = align(weight_profit(first, table))
            kept += float((order == torch.arange(table.width)).double().mean())
        count += 1
    if count < 2:
        raise UnmergeableExpertError("fewer than two experts are alike in kind and width")
    cosine = (float(total.square().sum()) - count) / (count * (count - 1))
    return Ancestry(cosine, kept / (count - 1))
