"""Factorisation of dense feed-forward blocks into experts of fewer neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moec.experts import (
    FeedForward,
    UnreadableExpertError,
    find_dense_layers,
    load_dense,
    make_sparse,
)
from moec.experts.dense import DenseLayer
from moec.ir import Operation
from moec.passes.factorizing.activity import Activity, Observed
from moec.passes.factorizing.blocks import cut, output_without
from moec.passes.factorizing.division import Division, Partition, RowsOf, SharedBy, Uneven
from moec.passes.neuron_pruning.slicing import slice_neurons, slicing_problem
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass

_TOKENS_PER_MARKER = 16


@register_pass("factorize")
@dataclass(frozen=True)
class Factorize(Pass):
    """Cuts every dense feed-forward block into experts, each with some of its neurons.

    1. Neurons are partitioned: each becomes part of one expert, or of the `shared` neurons, which stay a dense block
       that every token runs. Blocks that stand beside experts already are left as they are.
    2. All experts are chosen with gate 1, so that the model computes what it did, whatever the router says: its weight
       is zero until `init-router` sets it, and `set-routing` makes the layer sparse.
    3. `contiguous`, `random` and `k-means` read weights alone. `co-activation` and `co-activation-graph` need
       `calibrate` in front: a neuron's marker says for each token whether it is among the `active` most active ones.
       `gradient` needs `calibrate{gradients=true}`, and gives each neuron to a kind of text whose loss it matters to.
       Kinds are the calibration's texts where there is one for each expert, else groups of similar sequences.

    A calibration in front serves what follows, too: `calibrate,factorize{...},init-router,set-routing{...}`.

    MoEfication (Zhang et al. 2022), LLaMA-MoE (Zhu et al. 2024), FactorLLM (arXiv 2408.11855), CMoE.
    """

    claim: ClassVar[Claim] = Claim.EXACT
    blocks = Statistic("dense blocks cut into experts")
    experts: int = option("experts for each block")
    partition: Partition = option("which neurons go together", Partition.K_MEANS)
    rows: RowsOf = option("what k-means compares", RowsOf.GATE)
    activity: Activity = option("how active a neuron is on a token", Activity.CONTRIBUTION)
    active: int = option("neurons that count as active on a token; 0 is a tenth of them", 0)
    iterations: int = option("co-activation: how often groups are formed anew; CMoE does it once", 20)
    shared: int = option("neurons that stay dense", 0)
    shared_by: SharedBy = option("which neurons stay dense", SharedBy.COLUMNS)
    uneven: Uneven = option("what to do where the experts do not divide the width", Uneven.REFUSE)

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise ValueError("experts must be at least 1")
        if self.shared < 0 or self.active < 0:
            raise ValueError("shared and active must not be negative")
        if self.iterations < 1:
            raise ValueError("iterations must be at least 1")

    def run(self, op: Operation, context: PassContext) -> None:
        for layer in find_dense_layers(op):
            if layer.is_beside_experts:
                context.refuse(layer.op, "it stands beside experts", self.pass_name)
                continue
            try:
                block = load_dense(layer, context.require_weights())
            except UnreadableExpertError as error:
                context.refuse(layer.op, error.message, self.pass_name)
                continue
            problem = slicing_problem(block)
            if problem:
                context.refuse(layer.op, problem, self.pass_name)
                continue
            self._cut(layer, block, context)
            context.count(self.blocks)

    def _cut(self, layer: DenseLayer, block: FeedForward, context: PassContext) -> None:
        def text() -> Observed:
            calibration = context.require_calibration()
            return Observed.of(calibration, calibration.sample(layer))

        division = self._division()
        generator = torch.Generator().manual_seed(context.seed * 1_000_003 + layer.index)
        neurons, groups = division.divide(layer.name, block, text, generator)
        shared = None if neurons is None else slice_neurons(block, neurons)
        if division.reads_text:
            self._check_rows(layer, len(text()), division.active_neurons(block.width), block.width, context)
        # the output bias is added once
        experts = cut(block, groups, pad=self.uneven is Uneven.PAD, biased=0 if shared is None else None)
        module = context.module
        calibration = None if module is None else module.calibration
        if module is not None and calibration is not None and shared is not None and calibration.knows(layer):
            # what init-router and set-routing aim at is now the output of the experts alone
            module.calibration = calibration.with_outputs(
                {layer.name: output_without(calibration.sample(layer), shared)}
            )
        make_sparse(layer, context.require_weights(), experts, shared)

    def _division(self) -> Division:
        return Division(
            self.experts,
            self.partition,
            self.rows,
            self.activity,
            self.active,
            self.iterations,
            self.shared,
            self.shared_by,
            self.uneven,
        )

    def _check_rows(self, layer: DenseLayer, rows: int, active: int, width: int, context: PassContext) -> None:
        needed = -(-_TOKENS_PER_MARKER * width // active)
        if rows < needed:
            context.remark(
                layer.op,
                f"{rows} tokens to tell {width} neurons apart, of which {active} count as active on each; give "
                f"{needed} or more: calibrate{{sequences=... length=...}}",
            )
