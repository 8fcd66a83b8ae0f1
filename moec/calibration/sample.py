"""Rows of the original model at one layer, for everything that needs more than sums."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from moec.experts.layer import MoeLayer
from moec.experts.run import LayerRun, run_layer

if TYPE_CHECKING:
    from moec.weights.context import WeightContext


@dataclass(frozen=True, eq=False)
class LayerSample:
    """Tokens of the calibration text as one layer of the original model saw them, evenly spread, the same in all.

    `x` [R, H] went into the experts, `router_input` [R, H] into the router, `y` [R, H] came out of the experts;
    `gradient` [R, H] is the derivative of the text's loss (the sum over its tokens, in nats) by y, None without
    gradients; `sequence` int64 [R] is the sequence that a row is from. `weights` loads the tensors of layers.
    """

    x: torch.Tensor
    router_input: torch.Tensor
    y: torch.Tensor
    gradient: torch.Tensor | None
    sequence: torch.Tensor
    weights: WeightContext = field(repr=False)
    _routed: dict[int, tuple[MoeLayer, LayerRun]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        """R."""
        return len(self.x)

    def subset(self, rows: torch.Tensor) -> LayerSample:
        """The rows that a boolean mask [R] or indices select."""
        x = self.x[rows]
        router_input = x if self.router_input is self.x else self.router_input[rows]
        gradient = None if self.gradient is None else self.gradient[rows]
        return LayerSample(x, router_input, self.y[rows], gradient, self.sequence[rows], self.weights)

    def route(self, layer: MoeLayer) -> LayerRun:
        """Where `layer`, as it is now, sends the rows; its `y` is None."""
        known = self._routed.get(id(layer))
        if known is None or known[0] is not layer:
            run = run_layer(layer, self.weights, self.x, self.router_input, with_experts=False)
            known = (layer, run)
            self._routed.clear()
            self._routed[id(layer)] = known
        return known[1]

    def chosen(self, layer: MoeLayer, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows int64 [n], gates float64 [n]) of a stored expert; the gates of router outputs that share it add."""
        run = self.route(layer)
        gates = torch.where(run.stored_ids == expert, run.gates.double(), 0.0).sum(1)
        rows = (run.stored_ids == expert).any(1).nonzero()[:, 0]
        return rows, gates[rows]


def spread_rows(total: int, count: int) -> torch.Tensor:
    """`count` of the numbers below `total`, ascending and evenly spread; all where `count` is not smaller. int64."""
    if total <= count:
        return torch.arange(total)
    return torch.div(torch.arange(count) * total, count, rounding_mode="floor")
