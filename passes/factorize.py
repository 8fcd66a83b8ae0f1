"""Factorisation of dense feed-forward blocks, and of experts, into experts of fewer neurons."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar

import torch

from moec.dialects.nn import AttentionOp
from moec.errors import UsageError
from moec.experts import (
    Expert,
    FeedForward,
    MoeLayer,
    find_dense_layers,
    find_moe_layers,
    load_expert,
    make_sparse,
    replace_routing,
)
from moec.experts.dense import DenseLayer
from moec.experts.heads import UnreadableAttentionError, find_attention, make_heads_sparse, read_heads
from moec.experts.segment import segment_experts, segmenting_problem
from moec.ir import Operation
from moec.passes.factorizing.activity import Activity, Observed
from moec.passes.factorizing.blocks import cut, routed_output, segments, without_output_bias
from moec.passes.factorizing.division import Division, Partition, RowsOf, SharedBy, Uneven
from moec.passes.factorizing.heads import divide_heads
from moec.passes.factorizing.partition import group_sizes
from moec.passes.neuron_pruning.slicing import load_sliceable, slice_neurons, slicing_problem
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass

_TOKENS_PER_MARKER = 16


class Target(Enum):
    """What is cut into experts."""

    BLOCKS = "blocks"  # dense feed-forward blocks
    EXPERTS = "experts"  # the experts of layers that have some
    ATTENTION_HEADS = "attention-heads"  # attention


@register_pass("factorize")
@dataclass(frozen=True)
class Factorize(Pass):
    """Cuts every dense feed-forward block, or every expert, into experts, each with some of its neurons.

    1. Neurons are partitioned: each becomes part of one expert, or of the `shared` neurons, which stay a dense block
       that every token runs. Blocks that stand beside experts already are left as they are.
    2. All experts are chosen with gate 1, so that the model computes what it did, whatever the router says: its weight
       is zero until `init-router` sets it, and `set-routing` makes the layer sparse.
    3. `contiguous`, `random` and `k-means` read weights alone. `co-activation` and `co-activation-graph` need
       `calibrate` in front: a neuron's marker says for each token whether it is among the `active` most active ones.
       `gradient` needs `calibrate{gradients=true}`, and gives each neuron to a kind of text whose loss it matters to.
       Kinds are the calibration's texts where there is one for each expert, else groups of similar sequences.
    4. `domain-masks` and `gradient-overlap` are not partitions, and not exact: the experts of two kinds of text may
       have neurons in common, and neurons that none has are gone. What all have stays dense. Each token gets one
       expert, since a neuron must not count twice.

    The bias of the output is added once, behind the experts.

    `target=experts` makes finer experts of those that there are (DeepSeekMoE): router outputs are repeated for each
    part, tokens choose all parts of what they chose, and the scale makes up for scores that copies share. Routers whose
    choice could fall between the parts of an expert, such as top-p, are refused.

    `target=attention-heads` makes experts of groups of heads (Union of Experts); query heads that share a key stay
    together. An expert is its heads' part of the output projection, and the router reads what queries are made of.
    Where a token chooses some experts, the products of the output projection for the others are saved; queries, keys,
    values and scores are computed for all heads, since other tokens may need them. k-means compares columns of the
    output projection; partitions by text need `calibrate{heads=true}` in front: a unit is as active as what it adds to
    the output is long, and as many count as active as an expert has, unless `active` says otherwise.

    A calibration in front serves what follows, too: `calibrate,factorize{...},init-router,set-routing{...}`.

    MoEfication (Zhang et al. 2022), LLaMA-MoE (Zhu et al. 2024), FactorLLM (arXiv 2408.11855), CMoE, Read-ME.
    """

    claim: ClassVar[Claim] = Claim.EXACT
    blocks = Statistic("dense blocks cut into experts")
    dropped = Statistic("neurons that no expert has")
    segmented = Statistic("layers whose experts became finer")
    attention = Statistic("attention whose heads became experts")
    experts: int = option("experts for each block, for each expert, or for each attention")
    target: Target = option("what is cut", Target.BLOCKS)
    partition: Partition = option("which neurons go together", Partition.K_MEANS)
    rows: RowsOf = option("what k-means compares", RowsOf.GATE)
    activity: Activity = option("how active a neuron is on a token", Activity.CONTRIBUTION)
    active: int = option("neurons that count as active on a token; 0 is a tenth of them", 0)
    iterations: int = option("co-activation: how often groups are formed anew; CMoE does it once", 20)
    shared: int = option("neurons that stay dense", 0)
    shared_experts: int = option("neurons that stay dense, as many as that number of further experts would have", 0)
    shared_by: SharedBy = option("which neurons stay dense", SharedBy.COLUMNS)
    uneven: Uneven = option("what to do where the experts do not divide the width", Uneven.REFUSE)
    keep: float = option("domain-masks, gradient-overlap: share of the neurons that each expert has", 0.5)

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise ValueError("experts must be at least 1")
        if self.shared < 0 or self.shared_experts < 0 or self.active < 0:
            raise ValueError("shared, shared_experts and active must not be negative")
        if self.shared and self.shared_experts:
            raise ValueError("give either shared or shared_experts")
        if self.iterations < 1:
            raise ValueError("iterations must be at least 1")
        if not 0 < self.keep <= 1:
            raise ValueError("keep must be above 0 and at most 1")
        if self.partition.overlaps and (self.shared or self.shared_experts):
            raise ValueError(f"partition={self.partition.value} shares what all experts have, not a number of neurons")

        if self.target is not Target.BLOCKS and (self.partition.overlaps or self.shared or self.shared_experts):
            raise ValueError(f"target={self.target.value} takes a partition, without shared neurons")
        if self.target is Target.ATTENTION_HEADS and self.uneven is Uneven.PAD:
            raise ValueError("heads cannot be padded; uneven=ragged gives experts of different numbers of heads")

    def promise(self) -> Claim:
        """Overlapping experts give something else than the block."""
        return Claim.LOSSY if self.partition.overlaps else Claim.EXACT

    def run(self, op: Operation, context: PassContext) -> None:
        context.require_weights()  # before any statistics are asked for
        if self.target is Target.EXPERTS:
            for moe_layer in find_moe_layers(op):
                self._segment(moe_layer, context)
            return
        if self.target is Target.ATTENTION_HEADS:
            for index, attention in enumerate(find_attention(op)):
                self._cut_heads(attention, index, context)
            return
        for layer in find_dense_layers(op):
            if layer.is_beside_experts:
                context.refuse(layer.op, "it stands beside experts", self.pass_name)
                continue
            block = load_sliceable(layer, context, self.pass_name)
            if block is not None:
                self._cut(layer, block, context)
                context.count(self.blocks)

    def _cut(self, layer: DenseLayer, block: FeedForward, context: PassContext) -> None:
        def text() -> Observed:
            calibration = context.require_calibration()
            return Observed.of(calibration, calibration.sample(layer))

        division = self._division(block.width)
        neurons, groups = division.divide(layer.name, block, text, self._generator(layer.index, context))
        shared = None if neurons is None else without_output_bias(slice_neurons(block, neurons))
        if division.reads_text:
            self._check_rows(layer.op, len(text()), block.width, context)
        bias = block.down.bias
        module = context.module
        calibration = None if module is None else module.calibration
        if module is not None and calibration is not None and calibration.knows(layer) and (bias is not None or shared):
            # what init-router and set-routing aim at is now the output of the experts alone
            rest = routed_output(calibration.sample(layer), shared, bias)
            module.calibration = calibration.with_outputs({layer.name: rest})
        experts = cut(block, groups, pad=self.uneven is Uneven.PAD)
        made = make_sparse(layer, context.require_weights(), experts, shared, bias)
        if self.partition.overlaps:
            replace_routing(made, replace(made.route.routing, k=1))
            used = torch.zeros(block.width, dtype=torch.bool)
            used[torch.cat(groups if neurons is None else [neurons, *groups])] = True
            context.count(self.dropped, int((~used).sum()))

    def _segment(self, layer: MoeLayer, context: PassContext) -> None:
        weights, division = context.require_weights(), self._division()
        problem = segmenting_problem(layer.route)
        for number in range(0 if problem else layer.expert_count):
            expert = load_expert(layer, weights, number)
            problem = problem or slicing_problem(expert)
        if problem:
            context.refuse(layer.experts, problem, self.pass_name)
            return
        generator = self._generator(layer.index, context)

        def split(number: int, expert: Expert) -> list[Expert]:
            assert isinstance(expert, FeedForward)
            where = f"{layer.name}, expert {number}"

            def text() -> Observed:
                observed = Observed.of_expert(context.require_calibration(), layer, number)
                if not len(observed):
                    raise UsageError("no token of the calibration chose this expert", where=where)
                return observed

            _, groups = division.divide(where, expert, text, generator)
            if division.reads_text:
                self._check_rows(layer.experts, len(text()), expert.width, context)
            return segments(expert, groups, pad=self.uneven is Uneven.PAD)

        segment_experts(layer, weights, self.experts, split)
        context.count(self.segmented)

    def _cut_heads(self, attention: AttentionOp, index: int, context: PassContext) -> None:
        try:
            heads = read_heads(attention, index)
        except UnreadableAttentionError as error:
            context.refuse(attention, str(error), self.pass_name)
            return
        weights = context.require_weights()
        if heads.units < self.experts or (heads.units % self.experts and self.uneven is Uneven.REFUSE):
            raise UsageError(
                f"{self.experts} experts do not divide {heads.units} groups of heads",
                where=heads.name,
                hint="heads that share a key stay together; choose another number, or uneven=ragged",
            )
        sizes = group_sizes(heads.units, self.experts)

        def text() -> Observed:
            calibration = context.require_calibration()
            if not calibration.knows(heads):
                raise UsageError(
                    "its calibration has no rows of attention",
                    where=heads.name,
                    hint=f"partition={self.partition.value} of heads needs calibrate{{heads=true}} in front",
                )
            return Observed.of(calibration, calibration.sample(heads))

        generator = self._generator(index, context)
        groups = divide_heads(self._division(), heads, weights, sizes, text, generator)
        make_heads_sparse(heads, weights, [group.tolist() for group in groups])
        context.count(self.attention)

    def _generator(self, index: int, context: PassContext) -> torch.Generator:
        return torch.Generator().manual_seed(context.seed * 1_000_003 + index)

    def _division(self, width: int = 0) -> Division:
        """Of a block of `width` neurons; without one, where none is shared."""
        shared = width * self.shared_experts // (self.experts + self.shared_experts)
        return Division(
            self.experts,
            self.partition,
            self.rows,
            self.activity,
            self.active,
            self.iterations,
            self.shared or shared,
            self.shared_by,
            self.uneven,
            self.keep,
        )

    def _check_rows(self, op: Operation, rows: int, width: int, context: PassContext) -> None:
        active = self._division().active_neurons(width)
        needed = -(-_TOKENS_PER_MARKER * width // active)
        if rows < needed:
            context.warn(
                op,
                f"{rows} tokens to tell {width} neurons apart, of which {active} count as active on each; give "
                f"{needed} or more: calibrate{{sequences=... length=...}}",
            )
