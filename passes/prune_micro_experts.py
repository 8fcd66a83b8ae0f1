"""Pruning of the neurons of experts, each expert to a width of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.experts import (
    DenseLayer,
    FeedForward,
    MoeLayer,
    UnreadableExpertError,
    find_dense_layers,
    find_moe_layers,
    find_unreadable,
    load_expert,
    replace_dense,
)
from moec.ir import Operation
from moec.passes.neuron_pruning.scores import Criterion, NeuronScorer
from moec.passes.neuron_pruning.selection import Scope, ScoredExpert, select_neurons
from moec.passes.neuron_pruning.slicing import cut_layer, load_sliceable, slice_neurons, slicing_problem
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass


@register_pass("prune-micro-experts")
@dataclass(frozen=True)
class PruneMicroExperts(Pass):
    """Drops the neurons of experts that matter least: rows of gate and up and columns of down, cut for good.

    1. Each neuron gets a score by `criterion`. `camera` at alpha 0 is a good default, `energy-x-sensitivity` the better
       one across layers (`scope=global`); it and `heapr`, `heapr-sum`, `fisher`, `taylor` need `calibrate{gradients}`,
       `magnitude` and `random` need no calibration.
    2. In each ranking of `scope` the lowest `ratio` of the neurons go. Neurons of protected experts count, and stay.
       Ranking across the experts of a layer is most of the gain, and leaves experts of different widths.
    3. `round-to` adds neurons back up to a multiple. Neurons of an expert that no calibration token chose have score 0
       where the criterion is measured, so that it keeps `min-width` neurons. With `min-width=0` it may become a
       constant, its bias, or nothing at all; a layer keeps at least one neuron.

    With `shared` the neurons of shared experts, which every token runs, are ranked together with those of their
    layer's experts, as CAMERA does. CAMERA: AAAI 2026; its alpha of 0.9 or 1 was never better.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    neurons = Statistic("neurons of all experts before")
    removed = Statistic("neurons removed")
    narrowed = Statistic("experts that lost neurons")
    emptied = Statistic("experts without neurons left")
    unrouted = Statistic("experts that no calibration token chose")

    ratio: float = option("share of the neurons that go, at least 0 and below 1")
    criterion: Criterion = option("what neurons are ranked by", Criterion.CAMERA)
    scope: Scope = option("which neurons are ranked together", Scope.LAYER)
    alpha: float = option("camera: weight of the largest activation against the sum of squares", 0.0)
    round_to: int = option("widths become multiples of this, upwards", 1)
    min_width: int = option("neurons that each expert keeps at least", 1)
    shared: bool = option("rank the neurons of shared experts, too", False)

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio {self.ratio:g} is not within 0 <= ratio < 1")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha {self.alpha:g} is not within 0..1")
        if self.round_to < 1:
            raise ValueError("round-to must be at least 1")
        if self.min_width < 0:
            raise ValueError("min-width must not be negative")
        if self.shared and not self.min_width:
            raise ValueError("shared experts keep at least one neuron: min-width must not be 0")

    def run(self, op: Operation, context: PassContext) -> None:
        weights = context.require_weights()
        calibration = context.require_calibration() if self.criterion.is_measured else None
        scorer = NeuronScorer(self.criterion, calibration, alpha=self.alpha, seed=context.seed)
        for left in find_unreadable(op):
            context.refuse(left.op, left.reason, self.pass_name)
        scored: list[ScoredExpert] = []
        layers = find_moe_layers(op)
        beside = self._beside(op, layers, context) if self.shared else {}
        for layer in layers:
            scored += self._score(layer, scorer, context)
            for place, (_, block) in enumerate(beside.get(layer.name, ()), layer.expert_count):
                scored.append(ScoredExpert(layer.name, place, scorer.scores_beside(layer, block)))
        kept = select_neurons(scored, self.ratio, self.scope, round_to=self.round_to, min_width=self.min_width)
        for layer in layers:
            widths = {item.expert: item.width for item in scored if item.layer == layer.name}
            chosen = {
                item.expert: neurons for item, neurons in zip(scored, kept, strict=True) if item.layer == layer.name
            }
            self._report(layer, context, widths, {number: neurons.numel() for number, neurons in chosen.items()})
            chosen = {number: neurons for number, neurons in chosen.items() if neurons.numel() < widths[number]}
            for place, (dense, block) in enumerate(beside.get(layer.name, ()), layer.expert_count):
                if place in chosen:
                    replace_dense(dense, weights, slice_neurons(block, chosen.pop(place)))
            cut_layer(layer, weights, chosen)

    def _beside(
        self, op: Operation, layers: Sequence[MoeLayer], context: PassContext
    ) -> dict[str, list[tuple[DenseLayer, FeedForward]]]:
        """The shared experts of each layer whose neurons can be cut."""
        found: dict[str, list[tuple[DenseLayer, FeedForward]]] = {layer.name: [] for layer in layers}
        names = {layer.experts: layer.name for layer in layers}
        for dense in find_dense_layers(op):
            experts = dense.experts_beside
            if experts is None or experts not in names:
                continue
            if dense.is_weighted:
                context.refuse(dense.op, "its output has a gate of its own, which the calibration knows nothing of")
                continue
            block = load_sliceable(dense, context, self.pass_name)
            if block is not None:
                found[names[experts]].append((dense, block))
        return found

    def _score(self, layer: MoeLayer, scorer: NeuronScorer, context: PassContext) -> list[ScoredExpert]:
        """The scores of all experts of a layer that have neurons which can be cut."""
        found = []
        unrouted = []
        for number in range(layer.expert_count):
            try:
                expert = load_expert(layer, context.require_weights(), number)
            except UnreadableExpertError as error:
                context.refuse(layer.experts, error.message, self.pass_name)
                continue
            problem = slicing_problem(expert)
            if problem:
                context.refuse(layer.experts, f"stored expert {number}: {problem}", self.pass_name)
                continue
            assert isinstance(expert, FeedForward)
            if scorer.tokens(layer, number) == 0:
                unrouted.append(number)
            scores = scorer.scores(layer, number, expert)
            found.append(ScoredExpert(layer.name, number, scores, number in layer.protected))
        if unrouted:
            context.count(self.unrouted, len(unrouted))
            context.remark(
                layer.experts,
                f"no calibration token chose {len(unrouted)} of {layer.expert_count} experts, their neurons have score "
                f"0: {', '.join(map(str, unrouted[:8]))}{' ...' if len(unrouted) > 8 else ''}",
            )
        return found

    def _report(self, layer: MoeLayer, context: PassContext, widths: dict[int, int], left: dict[int, int]) -> None:
        before, after = sum(widths.values()), sum(left.values())
        context.count(self.neurons, before)
        context.count(self.removed, before - after)
        context.count(self.narrowed, sum(left[number] < widths[number] for number in widths))
        context.count(self.emptied, sum(not left[number] for number in widths))
        if before > after:
            spread = f"{min(left.values())} to {max(left.values())}"
            context.remark(layer.experts, f"{after} of {before} neurons stay; widths are {spread}")
