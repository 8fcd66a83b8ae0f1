"""Factorisation of dense feed-forward blocks, and of experts, into experts of fewer neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar

import torch

from moec.errors import UsageError
from moec.experts import (
    Dense,
    FeedForward,
    Projection,
    UnreadableExpertError,
    find_dense_layers,
    load_dense,
    make_sparse,
)
from moec.experts.dense import DenseLayer
from moec.ir import Operation
from moec.passes.factorizing.partition import balanced_k_means, contiguous, group_sizes, shuffled
from moec.passes.neuron_pruning.slicing import slice_neurons, slicing_problem
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass


class Partition(Enum):
    """Which neurons become one expert."""

    CONTIGUOUS = "contiguous"  # neighbours, as FactorLLM
    RANDOM = "random"  # drawn, as LLaMA-MoE
    K_MEANS = "k-means"  # those with similar weights, as MoEfication


class RowsOf(Enum):
    """Whose rows k-means compares; neurons without a gate have up and down only."""

    GATE = "gate"
    UP = "up"
    DOWN = "down"


class Uneven(Enum):
    """What happens where the experts do not divide the width."""

    REFUSE = "refuse"
    PAD = "pad"  # all experts get the larger width; the neurons that are missing are zero
    RAGGED = "ragged"  # widths differ by one


@register_pass("factorize")
@dataclass(frozen=True)
class Factorize(Pass):
    """Cuts every dense feed-forward block into experts, each with some of its neurons.

    1. Neurons are partitioned: each becomes part of one expert, or of the `shared` neurons, which stay a dense block
       that every token runs.
    2. All experts are chosen with gate 1, so that the model computes what it did, whatever the router says: its weight
       is zero until `init-router` sets it, and `set-routing` makes the layer sparse.

    MoEfication (Zhang et al. 2022), LLaMA-MoE (Zhu et al. 2024), FactorLLM (arXiv 2408.11855).
    """

    claim: ClassVar[Claim] = Claim.EXACT
    blocks = Statistic("dense blocks cut into experts")
    experts: int = option("experts for each block")
    partition: Partition = option("which neurons go together", Partition.K_MEANS)
    rows: RowsOf = option("what k-means compares", RowsOf.GATE)
    shared: int = option("neurons that stay dense: those whose columns of down are largest", 0)
    uneven: Uneven = option("what to do where the experts do not divide the width", Uneven.REFUSE)

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise ValueError("experts must be at least 1")
        if self.shared < 0:
            raise ValueError("shared must not be negative")

    def run(self, op: Operation, context: PassContext) -> None:
        weights = context.require_weights()
        for layer in find_dense_layers(op):
            try:
                block = load_dense(layer, weights)
            except UnreadableExpertError as error:
                context.refuse(layer.op, error.message, self.pass_name)
                continue
            problem = slicing_problem(block)
            if problem:
                context.refuse(layer.op, problem, self.pass_name)
                continue
            generator = torch.Generator().manual_seed(context.seed * 1_000_003 + layer.index)
            shared, groups = self._divide(layer, block, generator)
            bias_holder = shared is not None
            experts = [slice_neurons(block, neurons) for neurons in groups]
            if self.uneven is Uneven.PAD:
                width = max(expert.width for expert in experts)
                experts = [_padded(expert, width) for expert in experts]
            # the output bias is added once
            experts = [
                expert if number == 0 and not bias_holder else _without_output_bias(expert)
                for number, expert in enumerate(experts)
            ]
            make_sparse(layer, weights, experts, None if shared is None else slice_neurons(block, shared))
            context.count(self.blocks)

    def _divide(
        self, layer: DenseLayer, block: FeedForward, generator: torch.Generator
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """(neurons that stay dense, neurons of each expert), ascending."""
        routed = block.width - self.shared
        if routed < self.experts:
            raise UsageError(
                f"{routed} of {block.width} neurons are too few for {self.experts} experts", where=layer.name
            )
        if routed % self.experts and self.uneven is Uneven.REFUSE:
            raise UsageError(
                f"{self.experts} experts do not divide {routed} neurons",
                where=layer.name,
                hint="choose another number, or uneven=pad or uneven=ragged",
            )
        if not self.shared:
            return None, self._partition(block, torch.arange(routed), generator)
        strength = block.down.dense().square().sum(0)
        shared = strength.topk(self.shared).indices.sort().values
        rest = torch.ones(block.width, dtype=torch.bool)
        rest[shared] = False
        return shared, self._partition(block, rest.nonzero()[:, 0], generator)

    def _partition(self, block: FeedForward, neurons: torch.Tensor, generator: torch.Generator) -> list[torch.Tensor]:
        sizes = group_sizes(len(neurons), self.experts)
        match self.partition:
            case Partition.CONTIGUOUS:
                groups: Sequence[torch.Tensor] = contiguous(sizes)
            case Partition.RANDOM:
                groups = shuffled(sizes, generator)
            case Partition.K_MEANS:
                groups = balanced_k_means(self._rows(block)[neurons], sizes, generator)
        return [neurons[group] for group in groups]

    def _rows(self, block: FeedForward) -> torch.Tensor:
        """One vector of length 1 for each neuron [m, H]."""
        if self.rows is RowsOf.DOWN:
            rows = block.down.dense().T
        else:
            source = block.up if self.rows is RowsOf.UP or block.gate is None else block.gate
            rows = source.dense()
        return torch.nn.functional.normalize(rows, dim=1)


def _without_output_bias(expert: FeedForward) -> FeedForward:
    return replace(expert, down=replace(expert.down, bias=None))


def _padded(expert: FeedForward, width: int) -> FeedForward:
    """The expert with neurons of zeros up to a width; they give nothing, since their columns of down are zero."""
    more = width - expert.width
    if not more:
        return expert

    def rows(projection: Projection) -> Projection:
        weight = torch.nn.functional.pad(projection.dense(), (0, 0, 0, more))
        bias = None if projection.bias is None else torch.nn.functional.pad(projection.bias, (0, more))
        return Projection(Dense(weight), bias)

    gate = None if expert.gate is None else rows(expert.gate)
    down = Dense(torch.nn.functional.pad(expert.down.dense(), (0, more)))
    return replace(expert, gate=gate, up=rows(expert.up), down=replace(expert.down, matrix=down))
