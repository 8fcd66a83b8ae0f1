"""Copies of a feed-forward block as experts: whole, in shards, in ternary numbers, and perturbed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from moec.experts import Dense, FeedForward, Projection
from moec.experts.expert import Loaded


def shards(block: FeedForward, count: int) -> list[FeedForward]:
    """The block cut into `count` runs of neighbouring neurons, whose sum it is; they stay parts of the block's files.

    The first one has the bias of down, the others zeros of its size, so that all are of one kind. `count` divides the
    width.
    """
    if count == 1:
        return [block]
    size = block.width // count
    result = []
    for number in range(count):
        start, stop = number * size, (number + 1) * size
        found: list[Loaded] = []

        def cut(
            tensor: torch.Tensor, axis: int, start: int = start, stop: int = stop, found: list[Loaded] = found
        ) -> torch.Tensor:
            part = tensor.narrow(axis, start, stop - start)
            found.extend(_part_of(item, part, axis, start, stop) for item in block.loaded if item.holds(tensor))
            return part

        bias = block.down.bias
        if bias is not None:
            bias = bias if number == 0 else torch.zeros_like(bias)
        result.append(
            replace(
                block,
                gate=None if block.gate is None else _rows(block.gate, cut),
                up=_rows(block.up, cut),
                down=Projection(Dense(cut(block.down.dense(), 1)), bias),
                loaded=tuple(found),
            )
        )
    return result


def _rows(projection: Projection, cut: Callable[[torch.Tensor, int], torch.Tensor]) -> Projection:
    bias = None if projection.bias is None else cut(projection.bias, 0)
    return Projection(Dense(cut(projection.dense(), 0)), bias)


def _part_of(item: Loaded, part: torch.Tensor, axis: int, start: int, stop: int) -> Loaded:
    """Where a part `start:stop` along an axis of a loaded tensor lies."""
    view = item.view
    along = 1 - axis if view.transposed else axis
    starts, stops = list(view.starts), list(view.stops)
    step = view.steps[along]
    starts[along] = view.starts[along] + start * step
    stops[along] = view.starts[along] + (stop - 1) * step + 1
    return replace(
        item, tensor=part, version=part._version, view=replace(view, starts=tuple(starts), stops=tuple(stops))
    )


def ternary(block: FeedForward) -> FeedForward:
    """The block with matrices of -s, 0 and s: s = mean |W| of each matrix, W' = s clip(round(W / s), -1, 1).

    BitNet b1.58's absolute mean, as MoTE takes it for its routed experts; biases stay as they are.
    """

    def encode(projection: Projection) -> Projection:
        weight = projection.dense()
        scale = weight.abs().mean()
        if not scale > 0:
            return projection
        return replace(projection, matrix=Dense((weight / scale).round().clamp(-1, 1) * scale))

    return replace(
        block,
        gate=None if block.gate is None else encode(block.gate),
        up=encode(block.up),
        down=encode(block.down),
    )


def with_noise(block: FeedForward, ratio: float, deviation: float, generator: torch.Generator) -> FeedForward:
    """The block with normal noise on a share `ratio` of the elements of its matrices, drawn one by one."""

    def disturb(projection: Projection) -> Projection:
        weight = projection.dense()
        noise = torch.randn(weight.shape, generator=generator) * deviation
        hit = torch.rand(weight.shape, generator=generator) < ratio
        return replace(projection, matrix=Dense(weight + noise * hit))

    return replace(
        block,
        gate=None if block.gate is None else disturb(block.gate),
        up=disturb(block.up),
        down=disturb(block.down),
    )


def drawn_neurons(width: int, ratio: float, generator: torch.Generator) -> torch.Tensor:
    """floor(ratio width) neurons int64, ascending."""
    return torch.randperm(width, generator=generator)[: int(ratio * width)].sort().values


def with_new_neurons(block: FeedForward, neurons: Sequence[torch.Tensor], generator: torch.Generator) -> FeedForward:
    """The block with some neurons drawn anew: `neurons` int64 for gate, up and down.

    New entries are normal with the mean and the standard deviation of those that they replace, matrix by matrix, biases
    of gate and up included (Drop-Upcycling).
    """
    of_gate, of_up, of_down = neurons

    def redraw(tensor: torch.Tensor, axis: int, chosen: torch.Tensor) -> torch.Tensor:
        old = tensor.index_select(axis, chosen)
        if old.numel() == 0:
            return tensor
        deviation, mean = torch.std_mean(old, correction=0)
        new = torch.randn(old.shape, generator=generator) * deviation + mean
        return tensor.index_copy(axis, chosen, new)

    def rows(projection: Projection, chosen: torch.Tensor) -> Projection:
        bias = None if projection.bias is None else redraw(projection.bias, 0, chosen)
        return Projection(Dense(redraw(projection.dense(), 0, chosen)), bias)

    return replace(
        block,
        gate=None if block.gate is None else rows(block.gate, of_gate),
        up=rows(block.up, of_up),
        down=replace(block.down, matrix=Dense(redraw(block.down.dense(), 1, of_down))),
    )
