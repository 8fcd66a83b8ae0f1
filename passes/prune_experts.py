"""Pruning of whole experts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch

from moec.calibration.calibration import Calibration
from moec.errors import UsageError
from moec.experts import Constant, MoeLayer, alias_experts, find_moe_layers, replace_experts, slice_experts
from moec.ir import Operation
from moec.passes.expert_pruning import Criterion, best_subset, expert_scores, greedy_scores, leave_one_out
from moec.passes.expert_pruning.subset import SubsetErrors
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass


class OnDrop(Enum):
    """What becomes of the router outputs of a dropped expert."""

    RESELECT = "reselect"  # they go; tokens choose again among the others
    ZERO = "zero"  # they stay and give nothing
    CONSTANT = "constant"  # they give the expert's mean output (MoNE)
    REDIRECT = "redirect"  # they lead to the kept expert that is nearest on the expert's own tokens


class Scope(Enum):
    """Among which experts the ranking is made."""

    LAYER = "layer"
    GLOBAL = "global"


@register_pass("prune-experts")
@dataclass(frozen=True)
class PruneExperts(Pass):
    """Drops the experts that matter least on the calibration text.

    Criteria are those of REAP (reap-mean; the sum instead of the mean ranks better on language-model loss, and is the
    default), NAEE (naee-exact, naee-greedy), MoNE, SEER-MoE (gate-mass) and the plain ones. With scope=layer every
    layer loses the same share; with scope=global scores compete across layers, each layer's weighted by the energy of
    the loss's gradient where the calibration has gradients, else divided by their sum. Protected experts stay, and
    every layer keeps as many outputs as a token chooses. Routers that limit groups lose equally many experts of each.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    dropped = Statistic("experts dropped")
    unused = Statistic("experts that no calibration token chose")
    ratio: float = option("share of the experts to drop, from 0 to below 1", 0.25)
    keep: int = option("experts to keep in each layer, instead of a ratio; 0 for none given", 0)
    criterion: Criterion = option("how experts are ranked", Criterion.REAP_SUM)
    scope: Scope = option("rank in each layer or over all", Scope.LAYER)
    on_drop: OnDrop = option("what becomes of the outputs of a dropped expert", OnDrop.RESELECT)

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio {self.ratio} is not within 0 to below 1")
        if self.keep < 0:
            raise ValueError(f"keep {self.keep} is negative")
        if self.scope is Scope.GLOBAL and (self.keep or self.criterion.needs_sample):
            raise ValueError("scope=global takes a ratio and a criterion that is a sum")

    def run(self, op: Operation, context: PassContext) -> None:
        calibration = context.require_calibration()
        layers = find_moe_layers(op)
        for layer, kept in zip(layers, self._choose(layers, calibration, context), strict=True):
            unused = calibration.statistics(layer).count == 0
            context.count(self.unused, int(unused.sum()))
            gone = [expert for expert in range(layer.expert_count) if expert not in kept]
            if gone:
                context.count(self.dropped, len(gone))
                context.remark(layer.experts, f"drops the experts {', '.join(map(str, gone))} of {layer.name}")
                self._drop(layer, gone, calibration, context)

    # -- choice --------------------

    def _choose(
        self, layers: tuple[MoeLayer, ...], calibration: Calibration, context: PassContext
    ) -> list[frozenset[int]]:
        """The experts that each layer keeps."""
        if self.scope is Scope.LAYER:
            return [self._choose_in(layer, calibration, context.seed) for layer in layers]
        scores = [self._weighted_scores(layer, calibration, context.seed) for layer in layers]
        total = sum(layer.expert_count for layer in layers)
        least = [_ranked(layer, table)[: self._least(layer)] for layer, table in zip(layers, scores, strict=True)]
        wanted = total - round(self.ratio * total)
        free = [
            (-float(scores[at][expert]), at, expert)
            for at, layer in enumerate(layers)
            for expert in range(layer.expert_count)
            if expert not in least[at]
        ]
        chosen = sorted(free)[: max(wanted - sum(map(len, least)), 0)]
        kept = [set(experts) for experts in least]
        for _, at, expert in chosen:
            kept[at].add(expert)
        for layer, experts in zip(layers, kept, strict=True):
            if self.on_drop is OnDrop.RESELECT and layer.route.routing.groups > 1:
                raise UsageError(
                    "scope=global would leave groups of different sizes", where=layer.name, hint="use scope=layer"
                )
            assert layer.protected <= experts
        return [frozenset(experts) for experts in kept]

    def _choose_in(self, layer: MoeLayer, calibration: Calibration, seed: int) -> frozenset[int]:
        count = layer.expert_count
        keep = min(self.keep, count) if self.keep else count - round(self.ratio * count)
        least = self._least(layer)
        if keep < least:
            raise UsageError(
                f"{keep} of {count} experts would be left, but a token chooses {layer.top_k}, and "
                f"{len(layer.protected)} are protected",
                where=layer.name,
                hint=f"keep at least {least}",
            )
        if keep == count:
            return frozenset(range(count))
        if self.criterion is Criterion.NAEE_EXACT:
            errors = SubsetErrors(layer, calibration.sample(layer))
            return frozenset(best_subset(errors, count, keep, layer.protected))
        scores = self._scores(layer, calibration, keep, seed)
        ranked = _ranked(layer, scores)
        groups = layer.route.routing.groups
        if self.on_drop is not OnDrop.RESELECT or groups == 1:
            return frozenset(ranked[:keep])
        return self._choose_by_group(layer, ranked, keep)

    def _choose_by_group(self, layer: MoeLayer, ranked: list[int], keep: int) -> frozenset[int]:
        """Equally many experts of each group of router outputs."""
        groups = layer.route.routing.groups
        if layer.stored != tuple(range(layer.outputs)):
            raise UsageError("experts of a grouped router that share outputs cannot be pruned", where=layer.name)
        if keep % groups:
            raise UsageError(
                f"{keep} experts cannot be spread evenly over {groups} groups",
                where=layer.name,
                hint=f"keep a multiple of {groups}",
            )
        size = layer.outputs // groups
        members = [[expert for expert in ranked if expert // size == group] for group in range(groups)]
        chosen = {expert for group in members for expert in group[: keep // groups]}
        lost = sorted(layer.protected - chosen)
        if lost:
            raise UsageError(f"the protected expert {lost[0]} would have to go", where=layer.name, hint="drop fewer")
        return frozenset(chosen)

    def _scores(self, layer: MoeLayer, calibration: Calibration, keep: int, seed: int) -> torch.Tensor:
        if not self.criterion.needs_sample:
            return expert_scores(self.criterion, calibration.statistics(layer), seed + layer.index)
        errors = SubsetErrors(layer, calibration.sample(layer))
        if self.criterion is Criterion.LEAVE_ONE_OUT:
            return leave_one_out(errors, layer.expert_count)
        return greedy_scores(errors, layer.expert_count, keep, layer.protected)

    def _weighted_scores(self, layer: MoeLayer, calibration: Calibration, seed: int) -> torch.Tensor:
        scores = self._scores(layer, calibration, layer.expert_count, seed)
        energy = calibration.statistics(layer).layer_gradient_energy
        return scores / scores.sum().clamp(min=1e-300) if energy is None else scores * energy

    def _least(self, layer: MoeLayer) -> int:
        """How many experts must stay: the protected ones, and enough that a token finds as many as it chooses."""
        needed = layer.top_k if self.on_drop is OnDrop.RESELECT else 1
        return max(len(layer.protected), min(needed, layer.expert_count))

    # -- change --------------------

    def _drop(self, layer: MoeLayer, gone: list[int], calibration: Calibration, context: PassContext) -> None:
        weights = context.require_weights()
        match self.on_drop:
            case OnDrop.RESELECT:
                slice_experts(layer, [output for output, expert in enumerate(layer.stored) if expert not in gone])
            case OnDrop.ZERO:
                alias_experts(layer, [-1 if expert in gone else expert for expert in layer.stored])
            case OnDrop.CONSTANT:
                statistics = calibration.statistics(layer)
                means = statistics.output_sum / statistics.count.clamp(min=1)[:, None]
                replace_experts(layer, weights, {expert: Constant(means[expert].float()) for expert in gone})
            case OnDrop.REDIRECT:
                # a copy: calibration keeps its table for the passes behind this one
                distortion = calibration.redirect_distortion(layer).index_fill(1, torch.tensor(gone), torch.inf)
                target = {expert: int(distortion[expert].argmin()) for expert in gone}
                alias_experts(layer, [target.get(expert, expert) for expert in layer.stored])


def _ranked(layer: MoeLayer, scores: torch.Tensor) -> list[int]:
    """Stored experts, protected ones first, then by falling score; of equal ones the lower number first."""
    return sorted(
        range(layer.expert_count), key=lambda expert: (expert not in layer.protected, -float(scores[expert]), expert)
    )
