"""Routing to equally many experts of each of several groups."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from moec.dialects.moe import Routing, Select
from moec.errors import UsageError
from moec.experts import MoeLayer, find_moe_layers, find_unreadable, permute_experts
from moec.ir import Operation
from moec.passes.expert_groups.partition import (
    balanced_partition,
    groups_of,
    lost_gate_mass,
    lost_if_grouped_together,
    random_assignment,
)
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass

_RANDOM_GROUPINGS = 16


@register_pass("group-route")
@dataclass(frozen=True)
class GroupRoute(Pass):
    """Makes each token choose equally many experts in each of several equal groups, so that groups are always balanced.

    With one group per device, no device waits for another: the routing of Pangu Pro MoE (MoGE, arXiv 2505.21411).

    1. Experts that the same tokens choose go to different groups: the gate mass that pairs of experts lose in one group
       is made small by exchanging experts between groups.
    2. Experts move so that groups are neighbours, and the router chooses the best k / groups of each.
    3. The gate mass that is lost on the calibration text is reported, beside that of random groups.

    `groups` must divide k and the experts of each layer. One group changes nothing.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    grouped = Statistic("layers whose routers choose by group")

    groups: int = option("equal groups of experts")
    starts: int = option("random groupings that are improved; the best is taken", 8)

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError("groups must be at least 1")
        if self.starts < 1:
            raise ValueError("starts must be at least 1")

    def run(self, op: Operation, context: PassContext) -> None:
        for left in find_unreadable(op):
            context.refuse(left.op, left.reason, self.pass_name)
        if self.groups == 1:
            return
        generator = torch.Generator().manual_seed(context.seed)
        for layer in find_moe_layers(op):
            problem = _problem(layer)
            if problem:
                context.refuse(layer.route, problem, self.pass_name)
                continue
            self._check_sizes(layer)
            self._group(layer, context, generator)

    def _check_sizes(self, layer: MoeLayer) -> None:
        chosen = layer.route.routing.k
        for what, number in (("experts", layer.outputs), ("choices per token", chosen)):
            if number % self.groups:
                common = math.gcd(layer.outputs, chosen)
                fitting = [str(size) for size in range(2, common + 1) if common % size == 0]
                raise UsageError(
                    f"{self.groups} groups do not divide {number} {what}",
                    where=layer.name,
                    hint=f"groups that fit are {', '.join(fitting)}" if fitting else "no number of groups fits",
                )

    def _group(self, layer: MoeLayer, context: PassContext, generator: torch.Generator) -> None:
        run = context.require_calibration().sample(layer).route(layer)
        per_group = layer.route.routing.k // self.groups
        affinity = lost_if_grouped_together(run.ids, run.gates, layer.outputs)
        partition = balanced_partition(affinity, self.groups, generator, starts=self.starts)
        lost = lost_gate_mass(run.ids, run.gates, partition, per_group)
        others = [
            groups_of(random_assignment(layer.outputs, self.groups, generator), self.groups)
            for _ in range(_RANDOM_GROUPINGS)
        ]
        random = sum(lost_gate_mass(run.ids, run.gates, other, per_group) for other in others) / len(others)
        layer = permute_experts(layer, [output for members in partition for output in members])
        layer.route.routing = replace(layer.route.routing, select=Select.PER_GROUP_TOPK, groups=self.groups)
        context.count(self.grouped)
        context.remark(
            layer.experts,
            f"{self.groups} groups of {layer.outputs // self.groups} experts: tokens lose {lost:.1%} of their gate "
            f"mass, with random groups {random:.1%}",
        )


def _problem(layer: MoeLayer) -> str:
    """Why a layer cannot choose by group, in words; empty where it can."""
    routing: Routing = layer.route.routing
    if routing.select is not Select.TOPK:
        return f"its router selects by {routing.select.value}, not the best k"
    if routing.groups > 1:
        return f"its router has {routing.groups} groups of experts already"
    if routing.rank_offset or routing.skip_ratio or routing.null_experts or routing.k_max:
        return "its router skips choices, so that the number of experts of a token is not always k"
    if layer.route.mask is not None:
        return "its router has a mask, so that groups may have fewer experts than are chosen"
    return ""
