"""Experts made of some of a block's neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from moec.calibration.sample import LayerSample
from moec.experts import Constant, Dense, Expert, FeedForward, Projection
from moec.passes.factorizing.activity import CHUNK_ROWS
from moec.passes.neuron_pruning.slicing import slice_neurons


def cut(block: FeedForward, groups: Sequence[torch.Tensor], *, pad: bool) -> list[Expert]:
    """One expert for each group of neurons, without the output bias; with `pad` of equal width.

    An expert without neurons gives zeros.
    """
    width = max(len(neurons) for neurons in groups) if pad else 0
    return [_expert(block, neurons, width) for neurons in groups]


def segments(expert: FeedForward, groups: Sequence[torch.Tensor], *, pad: bool) -> list[Expert]:
    """As `cut`, of an expert among others: the first one has the output bias, the others zeros of its size, so that
    all are of one kind."""
    parts = cut(expert, groups, pad=pad)
    bias = expert.down.bias
    if bias is None:
        return parts
    biases = [bias, *[torch.zeros_like(bias)] * (len(parts) - 1)]
    return [
        replace(part, down=replace(part.down, bias=own)) if isinstance(part, FeedForward) else part
        for part, own in zip(parts, biases, strict=True)
    ]


def without_output_bias(block: FeedForward) -> FeedForward:
    """The block that gives its output less its bias."""
    return replace(block, down=replace(block.down, bias=None))


def routed_output(sample: LayerSample, shared: FeedForward | None, bias: torch.Tensor | None) -> torch.Tensor:
    """What is left of the block's output on a sample, [R, H], for the experts beside a shared block and a bias [H]."""
    y = sample.y if bias is None else sample.y - bias.to(sample.y.dtype)
    if shared is None:
        return y
    parts = [shared.apply(rows.float()) for rows in torch.split(sample.x, CHUNK_ROWS)]
    return y - torch.cat(parts).to(y.dtype)


def _expert(block: FeedForward, neurons: torch.Tensor, width: int) -> Expert:
    if not len(neurons) and not width:
        return Constant(torch.zeros(block.down.matrix.shape[0]))
    return _padded(without_output_bias(slice_neurons(block, neurons)), width)


def _padded(expert: FeedForward, width: int) -> FeedForward:
    """The expert with neurons of zeros up to a width; they give nothing, since their columns of down are zero."""
    more = width - expert.width
    if more <= 0:
        return expert

    def rows(projection: Projection) -> Projection:
        weight = torch.nn.functional.pad(projection.dense(), (0, 0, 0, more))
        bias = None if projection.bias is None else torch.nn.functional.pad(projection.bias, (0, more))
        return Projection(Dense(weight), bias)

    gate = None if expert.gate is None else rows(expert.gate)
    down = Dense(torch.nn.functional.pad(expert.down.dense(), (0, more)))
    return replace(expert, gate=gate, up=rows(expert.up), down=replace(expert.down, matrix=down))
