"""Experts that neighbouring layers share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch

from moec.experts import MoeLayer, find_moe_layers, find_unreadable, load_expert
from moec.experts.bank import BankExpert, add_outputs, growth_problem, share_experts
from moec.ir import Operation
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass


class Direction(Enum):
    """`grow`: each layer gets the experts of its neighbours, too. `shrink`: experts that are alike are stored once."""

    GROW = "grow"
    SHRINK = "shrink"


@dataclass(frozen=True)
class _Redirect:
    """An expert of one layer of a group that an expert of another replaces, and how much of its output that changes."""

    source: BankExpert
    target: BankExpert
    distortion: float


@register_pass("reuse-experts")
@dataclass(frozen=True)
class ReuseExperts(Pass):
    """Lets `group` neighbouring layers share experts, as ReXMoE does: weights that several layers read are stored once.

    1. `direction=grow` gives each layer the union of the group's experts, and router outputs for them with weights of
       zero behind a mask: the model computes what it did. To be trained on, with the mask opened.
    2. `direction=shrink` replaces an expert by one of another layer of the group where Σ g² ‖f' - f‖² over the
       calibration tokens that chose it is at most `max-distortion` of Σ g² ‖f‖², the closest pairs first. An expert
       that replaces others stays; so do protected experts, and those that no calibration token chose.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    added = Statistic("router outputs added, which are masked")
    redirected = Statistic("experts replaced by one of another layer")
    unrouted = Statistic("experts kept because no calibration token chose them")

    direction: Direction = option("grow, or shrink", Direction.SHRINK)
    group: int = option("neighbouring layers that share", 2)
    max_distortion: float = option("shrink: largest share of an expert's output energy that may change", 0.01)

    def __post_init__(self) -> None:
        if self.group < 2:
            raise ValueError("group must be at least 2")
        if self.max_distortion < 0:
            raise ValueError(f"max-distortion {self.max_distortion:g} is negative")

    def run(self, op: Operation, context: PassContext) -> None:
        for left in find_unreadable(op):
            context.refuse(left.op, left.reason, self.pass_name)
        for group in self._groups(find_moe_layers(op), context):
            if self.direction is Direction.GROW:
                self._grow(group, context)
            else:
                self._shrink(group, context)

    def _groups(self, layers: Sequence[MoeLayer], context: PassContext) -> Iterator[Sequence[MoeLayer]]:
        for start in range(0, len(layers), self.group):
            group = layers[start : start + self.group]
            if len(group) < 2:
                context.refuse(group[0].experts, "no layer is left to share with", self.pass_name)
            elif len({layer.hidden_size for layer in group}) > 1:
                context.refuse(group[0].experts, "the layers of its group have different hidden sizes", self.pass_name)
            else:
                yield group

    def _grow(self, group: Sequence[MoeLayer], context: PassContext) -> None:
        for layer in group:
            problem = growth_problem(layer)
            if problem:
                context.refuse(layer.route, problem, self.pass_name)
                return
        members = [
            [BankExpert(place, expert) for expert in range(layer.expert_count)] for place, layer in enumerate(group)
        ]
        used = [
            [*members[place], *(member for other in members if other is not members[place] for member in other)]
            for place in range(len(group))
        ]
        shared = share_experts(group, used, [layer.stored for layer in group])
        for old, layer in zip(group, shared, strict=True):
            foreign = range(old.expert_count, layer.expert_count)
            add_outputs(layer, context.require_weights(), foreign)
            context.count(self.added, len(foreign))

    def _shrink(self, group: Sequence[MoeLayer], context: PassContext) -> None:
        chosen: dict[BankExpert, BankExpert] = {}
        kept: set[BankExpert] = set()
        # of two experts that could replace each other, the one of the earlier layer stays
        found = sorted(
            self._redirects(group, context), key=lambda item: (item.distortion, -item.source.layer, item.source.expert)
        )
        for item in found:
            if item.source in chosen or item.source in kept or item.target in chosen:
                continue
            chosen[item.source] = item.target
            kept.add(item.target)
        if not chosen:
            return
        used, stored = [], []
        for place, layer in enumerate(group):
            members: list[BankExpert] = []
            for expert in range(layer.expert_count):
                own = BankExpert(place, expert)
                if own not in chosen:
                    members.append(own)
            replaced = [chosen[own] for own in chosen if own.layer == place]
            members += sorted(set(replaced), key=lambda member: (member.layer, member.expert))
            used.append(members)
            targets = [BankExpert(place, expert) for expert in layer.stored]
            stored.append([members.index(chosen.get(own, own)) if own.expert >= 0 else -1 for own in targets])
            if replaced:
                context.remark(
                    layer.experts, f"{len(replaced)} of {layer.expert_count} experts are those of other layers"
                )
        context.count(self.redirected, len(chosen))
        share_experts(group, used, stored)

    def _redirects(self, group: Sequence[MoeLayer], context: PassContext) -> Iterator[_Redirect]:
        """All replacements within `max_distortion`."""
        weights, calibration = context.require_weights(), context.require_calibration()
        for place, layer in enumerate(group):
            sample = calibration.sample(layer)
            chosen = {}
            for number in sorted(set(range(layer.expert_count)) - layer.protected):
                rows, gates = sample.chosen(layer, number)
                if not len(rows):
                    context.count(self.unrouted)
                    continue
                chosen[number] = (rows, gates, load_expert(layer, weights, number).apply(sample.x[rows].float()))
            for other_place, other in enumerate(group):
                if other_place == place:
                    continue
                for candidate in range(other.expert_count):
                    expert = load_expert(other, weights, candidate)
                    for number, (rows, gates, output) in chosen.items():
                        changed = expert.apply(sample.x[rows].float()) - output
                        distortion = _share(changed, output, gates)
                        if distortion <= self.max_distortion:
                            yield _Redirect(BankExpert(place, number), BankExpert(other_place, candidate), distortion)


def _share(changed: torch.Tensor, output: torch.Tensor, gates: torch.Tensor) -> float:
    """Σ g² ‖changed‖² as a share of Σ g² ‖output‖², rows [n, H]; infinite where only the latter is zero."""
    squares = gates.square()
    change = float(squares @ changed.double().square().sum(1))
    energy = float(squares @ output.double().square().sum(1))
    if energy > 0:
        return change / energy
    return 0.0 if change == 0 else float("inf")
