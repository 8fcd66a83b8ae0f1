"""Does to experts what a plan says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from moec.budget.actions import ActionKind
from moec.budget.coding import Coder, coded_inputs
from moec.budget.offers import constant_output, factored
from moec.budget.plan import BudgetPlan, ExpertPlan, LayerPlan, read_plan
from moec.budget.shared_base import SharedBase, shared_base
from moec.budget.tables import DAMPING
from moec.calibration.sample import LayerSample
from moec.errors import UsageError
from moec.experts import (
    Constant,
    Expert,
    FeedForward,
    MoeLayer,
    alias_experts,
    find_moe_layers,
    load_expert,
    replace_experts,
)
from moec.ir import Operation
from moec.passes.factoring.sides import Basis, Norms, has_dense_matrices
from moec.passes.neuron_pruning.slicing import slice_neurons
from moec.passes.quantizing.inputs import ExpertInputs
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass

_NEED_SAMPLE = (ActionKind.FACTOR, ActionKind.DELTA, ActionKind.CONSTANT)


@register_pass("apply-plan")
@dataclass(frozen=True)
class ApplyPlan(Pass):
    """Makes experts smaller as the plan of `solve-budget` says, or one that was saved in a file.

    Narrowed, packed and factored experts and constants are new tensors; an expert that another one answers for and one
    that becomes nothing leave only their router outputs. Factors, constants and codes come from the calibration, so
    that a plan with such experts needs one.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    anchor: ClassVar[str] = "builtin.module"
    changed = Statistic("experts changed")
    file: Path | None = option("a plan as JSON; without it the one that solve-budget made", None)

    def run(self, op: Operation, context: PassContext) -> None:
        plan = self._plan(context)
        layers = {layer.name: layer for layer in find_moe_layers(op)}
        for item in plan.layers:
            if item.layer not in layers:
                raise UsageError(f"the plan is for a layer {item.layer} that the model does not have")
            _check(layers[item.layer], item)
        for item in plan.layers:
            context.count(self.changed, sum(row.action is not ActionKind.KEEP for row in item.experts))
            _apply(layers[item.layer], item, plan, context)

    def _plan(self, context: PassContext) -> BudgetPlan:
        if self.file is not None:
            return read_plan(self.file)
        if context.module is None or context.module.plan is None:
            raise UsageError("there is no plan", hint="put solve-budget in front of it, or name a file")
        return context.module.plan


def _check(layer: MoeLayer, plan: LayerPlan) -> None:
    """Raises UsageError where a plan does not fit its layer as it is now."""
    count = layer.expert_count
    if [row.expert for row in plan.experts] != list(range(count)):
        raise UsageError(f"the plan does not fit the {count} experts", where=layer.name, hint="solve the budget again")
    for row in plan.experts:
        kind = row.action
        if kind is not ActionKind.KEEP and row.expert in layer.protected:
            raise UsageError(f"the plan changes the protected expert {row.expert}", where=layer.name)
        if kind is ActionKind.REDIRECT and not (
            0 <= row.size < count and row.size != row.expert and plan.experts[row.size].action.is_stored
        ):
            raise UsageError(f"the plan redirects expert {row.expert} to {row.size}, which goes", where=layer.name)
        if (kind is ActionKind.QUANTIZE) > bool(row.bits) or bool(row.bits) != bool(row.down_bits):
            raise UsageError(f"the plan does not say how many bits expert {row.expert} has", where=layer.name)
        if kind is ActionKind.NARROW and not row.neurons:
            raise UsageError(f"the plan leaves expert {row.expert} no neurons", where=layer.name)


def _apply(layer: MoeLayer, plan: LayerPlan, whole: BudgetPlan, context: PassContext) -> None:
    weights = context.require_weights()
    needs_sample = any(row.action in _NEED_SAMPLE or row.bits for row in plan.experts)
    sample = context.require_calibration().sample(layer) if needs_sample else None
    norms = Norms(layer, sample, Basis.GATE_WHITENED, DAMPING)
    base = None
    if any(row.action is ActionKind.DELTA for row in plan.experts):
        base = shared_base(layer, weights, context.require_calibration().statistics(layer).count)
    stored = list(layer.stored)
    new: dict[int, Expert] = {}
    for row in plan.experts:
        if row.action is ActionKind.REDIRECT or row.action is ActionKind.ZERO:
            target = row.size if row.action is ActionKind.REDIRECT else -1
            stored = [target if layer.stored[output] == row.expert else now for output, now in enumerate(stored)]
        elif row.action is not ActionKind.KEEP:
            source = load_expert(layer, weights, row.expert)
            if row.bits:
                assert sample is not None
                new[row.expert] = _coded(source, row, whole, coded_inputs(layer, sample))
            else:
                new[row.expert] = _changed(source, row, layer, sample, norms, base)
    layer = replace_experts(layer, weights, new)
    if tuple(stored) != layer.stored:
        alias_experts(layer, stored)


def _changed(
    expert: Expert,
    row: ExpertPlan,
    layer: MoeLayer,
    sample: LayerSample | None,
    norms: Norms,
    base: SharedBase | None,
) -> Expert:
    where = f"{layer.name}, expert {row.expert}"
    if row.action is ActionKind.CONSTANT:
        assert sample is not None
        rows, gates = sample.chosen(layer, row.expert)
        return Constant(constant_output(expert.apply(sample.x[rows].float()), gates))
    if not isinstance(expert, FeedForward):
        raise UsageError("the plan is for an expert with neurons", where=where)
    if row.action is ActionKind.DELTA:
        if base is None or row.expert not in base.members:
            raise UsageError("the experts have no mean that the plan could start from", where=where)
        return base.differences(expert, row.expert, norms).at(row.size)
    if row.action is ActionKind.FACTOR:
        return factored(expert, row.expert, row.size, norms)
    return slice_neurons(expert, torch.tensor(_neurons(expert, row, where)))


def _coded(source: Expert, row: ExpertPlan, plan: BudgetPlan, inputs: ExpertInputs) -> FeedForward:
    where = f"{inputs.layer.name}, expert {row.expert}"
    if not isinstance(source, FeedForward) or not has_dense_matrices(source):
        raise UsageError("the plan packs matrices that are packed or factored already", where=where)
    coder = Coder.of(source, inputs, row.expert, plan.group, refit=plan.refit)
    return coder.coded(_neurons(source, row, where), row.bits, row.down_bits)


def _neurons(expert: FeedForward, row: ExpertPlan, where: str) -> tuple[int, ...]:
    """Those that stay, ascending; none where all do."""
    if not all(0 <= neuron < expert.width for neuron in row.neurons):
        raise UsageError(f"the plan keeps neurons that the expert does not have: it has {expert.width}", where=where)
    return tuple(sorted(set(row.neurons)))
