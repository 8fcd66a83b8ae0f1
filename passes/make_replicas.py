"""Experts in two precisions side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moec.errors import UsageError
from moec.experts import (
    Dense,
    Expert,
    FeedForward,
    Matrix,
    MoeLayer,
    UnreadableExpertError,
    find_moe_layers,
    find_unreadable,
    load_expert,
)
from moec.experts.replicas import add_replicas
from moec.ir import Operation
from moec.passes.factoring.sides import Side, projection, with_matrices
from moec.passes.quantizing.blocks import BlockPacker, Part
from moec.passes.quantizing.choices import Coding, FormatOptions
from moec.passes.quantizing.inputs import ExpertInputs, Policy, second_moment
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass
from moec.quantization.packed import Packed
from moec.quantization.rounding import Target, round_matrix
from moec.quantization.second_order import round_second_order
from moec.reference.replica import gates_before


@register_pass("make-replicas")
@dataclass(frozen=True)
class MakeReplicas(Pass):
    """Stores a second replica of experts in fewer bits, which tokens read where an expert counts little (HOBBIT).

    1. Every expert keeps the form that it has, which is its replica of high precision, and gets one in integers of
       `bits` beside it. With `resident`, experts that `plan-cache` finds in memory in this share of their uses get
       none: whoever needs them has them at hand.
    2. The graph decides for each slot by the gates of its token, as HOBBIT does when an expert must be loaded: the rank
       of a slot is the share of the gates that are larger. Up to `high` it reads the high replica, up to `low` the
       other one, above that none; gates stay as they are. What a cache holds at run time is no input of the graph.

    The file grows by the replicas, and a run reads fewer bytes. `high=1` changes nothing. The pass goes last among
    those that change experts: for what follows a layer with replicas is no plain layer any more.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    replicas = Statistic("replicas made")
    weights = Statistic("weights in them")
    bytes_added = Statistic("bytes that they take")
    without = Statistic("experts that are in memory anyway and get none")

    bits: int = option("bits of the low replica", 2)
    group: str = option("weights that share a scale: a number of inputs, row, or tensor", "32")
    method: Coding = option("how codes are chosen", Coding.GPTQ)
    damping: float = option("gptq: what is added to the diagonal of a second moment, as a share of its mean", 0.1)
    high: float = option("largest rank that reads the high replica, 0 to 1", 0.6)
    low: float = option("largest rank that reads the low replica; above it a slot gives nothing", 1.0)
    resident: float | None = option("simulated hit rate from which an expert gets no replica", None)

    def __post_init__(self) -> None:
        self.target()
        if not 0 <= self.high <= self.low <= 1:
            raise ValueError(f"high {self.high:g} and low {self.low:g} are not 0 <= high <= low <= 1")
        if not self.damping > 0:
            raise ValueError(f"damping {self.damping:g} is not above 0")
        if self.resident is not None and not 0 < self.resident <= 1:
            raise ValueError(f"resident {self.resident:g} is not within (0, 1]")

    def target(self) -> Target:
        """The format of replicas; raises ValueError for what cannot be."""
        return FormatOptions(bits=self.bits, group=self.group).target()

    def run(self, op: Operation, context: PassContext) -> None:
        for unreadable in find_unreadable(op):
            context.refuse(unreadable.op, unreadable.reason, self.pass_name)
        for layer in find_moe_layers(op):
            self._replicate(layer, context)

    def _replicate(self, layer: MoeLayer, context: PassContext) -> None:
        weights, packer = context.require_weights(), BlockPacker(tuple(Side), context, self.pass_name)
        inputs = None
        if self.method is Coding.GPTQ:
            inputs = ExpertInputs(layer, context.require_calibration().sample(layer), Policy.AUTO)
        resident = self._resident(layer, context)
        found: dict[int, Expert] = {}
        for number in sorted(set(range(layer.expert_count)) - layer.protected - resident):
            try:
                expert = load_expert(layer, weights, number)
            except UnreadableExpertError as error:
                context.refuse(layer.experts, error.message, self.pass_name)
                continue
            if not isinstance(expert, FeedForward):
                continue
            rounding = _Rounding(self, inputs, number)
            replica = packer.pack(layer.experts, _unpacked(expert), f"{layer.name}, expert {number}", rounding)
            if replica is not None:
                found[number] = replica
        context.count(self.without, len(resident))
        if not found:
            return
        share = self._low_share(layer, context, set(found))
        changed = add_replicas(layer, weights, found, self.high, self.low)
        context.count(self.replicas, len(found))
        context.count(self.weights, sum(packed.rows * packed.columns for packed in packer.stored))
        context.count(self.bytes_added, sum(packed.nbytes for packed in packer.stored))
        context.remark(changed, f"{len(found)} experts have a replica of {self.bits} bits{share}")

    def _resident(self, layer: MoeLayer, context: PassContext) -> set[int]:
        """Experts that a cache holds most of the time, as `plan-cache` found."""
        if self.resident is None:
            return set()
        plan = None if context.module is None else context.module.cache_plan
        if plan is None:
            raise UsageError("there is no plan of a cache", hint="put plan-cache in front of it")
        rates = plan.hit_rates.get(layer.name)
        if rates is None or len(rates) != layer.expert_count:
            raise UsageError("the plan of a cache does not fit this layer", where=layer.name, hint="plan it again")
        return {number for number, rate in enumerate(rates) if rate >= self.resident}

    def _low_share(self, layer: MoeLayer, context: PassContext, replicated: set[int]) -> str:
        """In words, how many of the slots of the calibration read a low replica; nothing without calibration."""
        calibration = None if context.module is None else context.module.calibration
        if calibration is None or not calibration.knows(layer):
            return ""
        run = calibration.sample(layer).route(layer)
        before, total = gates_before(run.gates)
        used = run.stored_ids >= 0
        can = torch.isin(run.stored_ids, torch.tensor(sorted(replicated)))
        reads = used & can & (before > self.high * total)
        share = float(reads.sum()) / max(int(used.sum()), 1)
        return f", which {share:.1%} of the calibration's slots read"


@dataclass(frozen=True)
class _Rounding:
    """The rounding of one expert; `inputs` None rounds to nearest codes."""

    options: MakeReplicas
    inputs: ExpertInputs | None
    number: int

    def __call__(self, part: Part) -> Packed:
        target = self.options.target()
        if self.inputs is None:
            return round_matrix(target, part.weight, part.where)
        rows, weights = self.inputs.rows(self.number)
        if part.side is Side.DOWN:
            rows = part.block.hidden_activations(rows)
        moment = second_moment(rows, weights)
        return round_second_order(
            target, part.weight, moment, damping=self.options.damping, ordered=True, where=part.where
        ).packed


def _unpacked(expert: FeedForward) -> FeedForward:
    """The expert with whole matrices."""
    matrices: dict[Side, Matrix] = {}
    for side in Side:
        found = projection(expert, side)
        if found is not None:
            matrices[side] = Dense(found.dense().float())
    return with_matrices(expert, matrices)
