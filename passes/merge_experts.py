"""Merging of experts: groups of experts share the weights of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moec.dialects.moe import Score
from moec.errors import UnsafeInputError
from moec.experts import (
    FeedForward,
    MoeLayer,
    UnreadableExpertError,
    alias_experts,
    find_moe_layers,
    find_unreadable,
    load_expert,
    replace_experts,
    slice_experts,
)
from moec.ir import Operation
from moec.passes.merging import (
    Alignment,
    GroupedLayer,
    Grouping,
    GroupingRequest,
    NeuronTable,
    RouterChange,
    Selection,
    UnmergeableExpertError,
    Weighting,
    activation_profit,
    align,
    join_router_outputs,
    keep_problem,
    merge_tables,
    plan_groups,
    weight_profit,
)
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass

ALIGNMENT_ROWS = 2048
"""Rows of the sample that hidden activations are compared on."""

RECOVERABLE = 4
"""UNCURL: more experts than so many for each that stays are not recovered by tuning."""


@register_pass("merge-experts")
@dataclass(frozen=True)
class MergeExperts(Pass):
    """Lets groups of experts of a layer share one expert: their mean, or the one that stands for the group best.

    1. `grouping`: by cosines of router logits (M-SMoE), mean outputs over all tokens (HC-SMoE), weights, spectral
       clusters of router logits (UNCURL), choice for the same tokens, `random` ones to compare with, or `facility`:
       the experts stay that answer for the others at the least squared error of gated outputs, solved exactly. With
       `refit-down` after it `facility` was the best way to fewer experts in our measurements: with `keep-dominant`
       where few go, otherwise with `align=activation weights=saliency select=global`.
    2. `select=global` lets layers keep different numbers: by share of tokens (M-SMoE), or, for `facility`, by error
       times the energy of the layer's gradient where `calibrate{gradients}` knows it.
    3. Neurons are aligned to the most important member of the group before they are averaged. Experts from one
       ancestor have one order already; for others, averaging without alignment destroys them.
    4. `router=alias` sends the outputs of all members to the shared expert and adds their gates, `keep-row` drops the
       outputs of all but the centre, so that tokens choose again, `log-sum-exp` does the same and refits the
       centre's row to the logarithm of the summed exponentials of the group.

    Experts of one group must be of one kind and width, unless `keep-dominant` is set. Protected experts stay as they
    are; with `keep-dominant` they may answer for others.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    before = Statistic("experts before")
    merged = Statistic("experts that went into another one")
    averaged = Statistic("experts with new weights")
    left = Statistic("layers left as they are")

    keep: float = option("experts that stay in each layer: a number, or a share below 1")
    grouping: Grouping = option("what makes experts go together", Grouping.ROUTER_COSINE)
    select: Selection = option("whether each layer keeps that many, or all layers together", Selection.LAYER)
    align: Alignment = option("how neurons are matched before they are averaged", Alignment.WEIGHT)
    weights: Weighting = option("what experts count in a mean, and which is the centre", Weighting.FREQUENCY)
    keep_dominant: bool = option("the centre stays as it is instead of being averaged with its group", False)
    router: RouterChange = option("what becomes of the router outputs of a group", RouterChange.ALIAS)
    time_limit: float = option("seconds for each choice of experts by facility location: of a layer, or of all", 60.0)

    def __post_init__(self) -> None:
        problem = keep_problem(self.keep)
        if problem is not None:
            raise ValueError(problem)
        if not self.time_limit > 0:
            raise ValueError("time-limit must be above 0")

    def run(self, op: Operation, context: PassContext) -> None:
        calibration, weights = context.require_calibration(), context.require_weights()
        for unreadable in find_unreadable(op):
            context.refuse(unreadable.op, unreadable.reason, self.pass_name)
            context.count(self.left)
        request = GroupingRequest(
            self.keep,
            self.grouping,
            self.select,
            self.align,
            self.weights,
            averages=not self.keep_dominant,
            keeps_rows=self.router is not RouterChange.ALIAS,
            time_limit=self.time_limit,
            seed=context.seed,
        )
        layers = [layer for layer in find_moe_layers(op) if self._is_possible(layer, context)]
        plan = plan_groups(layers, calibration, weights, request)
        for grouped in plan.layers:
            context.count(self.before, grouped.layer.expert_count)
            if len(grouped.groups) == grouped.layer.expert_count:
                continue
            try:
                new = {} if self.keep_dominant else self._means(grouped, context)
            except (UnmergeableExpertError, UnreadableExpertError) as error:
                context.refuse(grouped.layer.experts, str(error), self.pass_name)
                context.count(self.left)
                continue
            self._report(grouped, context, plan.gap)
            context.count(self.averaged, len(new))
            self._rewrite(grouped, new, context)

    def _is_possible(self, layer: MoeLayer, context: PassContext) -> bool:
        """Whether the pass can say anything of a layer; refuses it otherwise."""
        reason = None
        if self.router is RouterChange.LOG_SUM_EXP and layer.route.routing.score is not Score.SOFTMAX:
            reason = (
                f"log-sum-exp adds up masses of a softmax, but its router scores by {layer.route.routing.score.value}"
            )
        elif self.grouping is Grouping.WEIGHT:
            try:
                for expert in range(layer.expert_count):
                    NeuronTable.of(load_expert(layer, context.require_weights(), expert))
            except (UnmergeableExpertError, UnreadableExpertError) as error:
                reason = f"stored expert {expert} has no weights to compare: {error}"
        if reason is not None:
            context.refuse(layer.experts, reason, self.pass_name)
            context.count(self.left)
        return reason is None

    def _means(self, grouped: GroupedLayer, context: PassContext) -> dict[int, FeedForward]:
        """The new expert of each centre that gets company."""
        layer, weights = grouped.layer, context.require_weights()
        by_activation = self.align is Alignment.ACTIVATION
        x = context.require_calibration().sample(layer).x[:ALIGNMENT_ROWS].float() if by_activation else None
        result = {}
        for centre, members in grouped.groups.items():
            if len(members) == 1:
                continue
            experts = {member: load_expert(layer, weights, member) for member in (centre, *members)}
            tables = {}
            for member, expert in experts.items():
                table = tables[member] = NeuronTable.of(expert)
                if not table.is_finite:
                    raise UnsafeInputError(
                        "an expert has weights that are no finite numbers",
                        where=f"{layer.name}, stored expert {member}",
                        hint="the checkpoint is broken; download or save it again",
                    )
                first = tables[centre]
                if self.align is Alignment.NONE or member == centre or table.kind != first.kind:
                    continue
                if x is None:
                    profit = weight_profit(first, table)
                else:
                    profit = activation_profit(_hidden(experts[centre], x), _hidden(expert, x))
                tables[member] = table.take(align(profit))
            shares = [1.0 if self.weights is Weighting.UNIFORM else grouped.importance[member] for member in tables]
            result[centre] = merge_tables(list(tables.values()), shares).expert()
        return result

    def _rewrite(self, grouped: GroupedLayer, new: dict[int, FeedForward], context: PassContext) -> None:
        weights = context.require_weights()
        layer = grouped.layer
        centres = [-1 if expert < 0 else grouped.centres[expert] for expert in layer.stored]
        rows = {output for output, expert in enumerate(layer.stored) if expert == centres[output]}
        if self.router is RouterChange.LOG_SUM_EXP:
            groups = _output_groups(grouped)
            rows = {output for output in rows if output in groups or layer.stored[output] < 0}
            layer = join_router_outputs(layer, weights, context.require_calibration().sample(layer), groups)
        layer = replace_experts(layer, weights, new)
        if self.router is RouterChange.ALIAS:
            alias_experts(layer, centres)
        else:
            slice_experts(layer, sorted(rows))

    def _report(self, grouped: GroupedLayer, context: PassContext, gap: float | None) -> None:
        size, count = grouped.layer.expert_count, len(grouped.groups)
        context.count(self.merged, size - count)
        groups = [f"{centre} <- {', '.join(map(str, members))}" for centre, members in grouped.groups.items()]
        proof = "" if gap is None else f"; at most {gap:.2%} above the least possible error"
        context.remark(grouped.layer.experts, f"{count} of {size} experts stay{proof}: {'; '.join(groups)}")
        if size > RECOVERABLE * count:
            context.remark(
                grouped.layer.experts,
                f"{size / count:.1f} experts for each that stays: above {RECOVERABLE}, tuning may not recover them",
            )


def _hidden(expert: object, x: torch.Tensor) -> torch.Tensor:
    assert isinstance(expert, FeedForward)
    return expert.hidden_activations(x)


def _output_groups(grouped: GroupedLayer) -> dict[int, tuple[int, ...]]:
    """The router outputs of each group, by the first output of its centre."""
    layer = grouped.layer
    return {
        layer.outputs_of(centre)[0]: tuple(output for member in members for output in layer.outputs_of(member))
        for centre, members in grouped.groups.items()
    }
