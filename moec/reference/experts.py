"""`moe.experts` on torch: computed for the tokens that chose an expert, or, as a check, for all tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moec.dialects.moe import ExpertsOp
from moec.ir import Value
from moec.reference.frame import ExpertsLowering, Frame
from moec.reference.kernels import Kernel, prepares
from moec.reference.plan import BlockPlan, plan_block


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a stored expert lies: the plan of its class, its row in the stacks, and what the class shares."""

    plan: BlockPlan
    row: int
    stacks: tuple[Value, ...]
    shared: tuple[Value, ...]


@prepares(ExpertsOp)
def prepare_experts(op: ExpertsOp) -> Kernel:
    """The lowering is that of the run."""
    plans = [plan_block(region.block) for region in op.regions]
    places: dict[int, _Place] = {}
    for plan, (group, weights, _) in zip(plans, op.class_operands(), strict=True):
        stacks, shared = weights[: group.stacks], weights[group.stacks :]
        places.update((expert, _Place(plan, row, stacks, shared)) for row, expert in enumerate(group.experts))
    stored = torch.tensor(op.stored, dtype=torch.int64)

    def run_expert(frame: Frame, expert: int, tokens: torch.Tensor, whole: dict[Value, torch.Tensor]) -> torch.Tensor:
        place = places[expert]
        plan = place.plan
        for value in place.shared:
            if value not in whole:
                whole[value] = frame.tensor(value)
        given = [tokens, *(frame.row(stack, place.row) for stack in place.stacks)]
        given += [whole[value] for value in place.shared]
        inner = frame.inner(list(zip(plan.block.arguments, given, strict=True)), tokens.shape[0], expert)
        del given
        return plan.run(inner)[0]

    def compute(frame: Frame) -> tuple[torch.Tensor]:
        x, ids, gates = frame.tensor(op.x), frame.tensor(op.ids), frame.tensor(op.gates)
        gates = gates.to(x.dtype)
        targets = stored[ids] if len(stored) else torch.full_like(ids, -1)
        used = (targets >= 0) & (gates.detach() != 0)
        result = torch.zeros_like(x)
        # loaded once per run of the layer, by the first expert that reads it
        whole: dict[Value, torch.Tensor] = {}
        if frame.settings.experts is ExpertsLowering.ORACLE:
            for expert in sorted(places):
                hit = used & (targets == expert)
                gate = torch.where(hit, gates, 0.0).sum(1, keepdim=True)
                result = result + torch.where(hit.any(1, keepdim=True), gate * run_expert(frame, expert, x, whole), 0.0)
            return (result,)
        for expert, tokens, slots in _groups(targets, used):
            outputs = run_expert(frame, expert, x[tokens], whole)
            result = result.index_add(0, tokens, outputs * gates[tokens, slots, None])
        return (result,)

    return compute


def _groups(targets: torch.Tensor, used: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(expert, tokens, slots) of every expert that a used slot names, by ascending expert."""
    tokens, slots = torch.nonzero(used, as_tuple=True)
    named = targets[tokens, slots]
    order = torch.sort(named, stable=True).indices
    tokens, slots, named = tokens[order], slots[order], named[order]
    found, counts = torch.unique_consecutive(named, return_counts=True)
    start = 0
    for expert, count in zip(found.tolist(), counts.tolist(), strict=True):
        yield expert, tokens[start : start + count], slots[start : start + count]
        start += count
