"""Experts made of some of a block's neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from moec.calibration.sample import LayerSample
from moec.experts import Dense, FeedForward, Projection
from moec.passes.factorizing.activity import CHUNK_ROWS
from moec.passes.neuron_pruning.slicing import slice_neurons


def cut(block: FeedForward, groups: Sequence[torch.Tensor], *, pad: bool, biased: int | None) -> list[FeedForward]:
    """One expert for each group of neurons; with `pad` of equal width. The output bias goes to the expert `biased`."""
    experts = [slice_neurons(block, neurons) for neurons in groups]
    if pad:
        width = max(expert.width for expert in experts)
        experts = [_padded(expert, width) for expert in experts]
    return [
        expert if number == biased else replace(expert, down=replace(expert.down, bias=None))
        for number, expert in enumerate(experts)
    ]


def output_without(sample: LayerSample, shared: FeedForward) -> torch.Tensor:
    """What the experts beside a shared block give on a sample of the whole block, [R, H]."""
    parts = [shared.apply(rows.float()) for rows in torch.split(sample.x, CHUNK_ROWS)]
    return sample.y - torch.cat(parts).to(sample.y.dtype)


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
