"""Which experts a layer will choose, before it is reached: how often two predictors are right."""

from __future__ import annotations

import torch

from moec.calibration.sample import LayerSample
from moec.experts import MoeLayer
from moec.experts.run import run_layer


def next_gate_recall(layer: MoeLayer, sample: LayerSample, before: LayerSample) -> float:
    """The share of the experts of `layer` that its router names for the rows of the layer before (HOBBIT)."""
    with torch.no_grad():
        guess = run_layer(layer, sample.weights, before.x, before.router_input, with_experts=False)
    return _recall(guess.stored_ids, sample.route(layer).stored_ids)


def path_recall(chosen: torch.Tensor, before: torch.Tensor, experts: int, experts_before: int) -> float:
    """The share of experts that the likeliest ones, given the layer before, hold (EdgeMoE).

    `chosen` and `before` int64 [R, K], -1 empty. The first half of the rows makes the table, the second is guessed.
    """
    half = len(chosen) // 2
    table = torch.zeros(experts_before, experts)
    left, right = (_indicator(ids, size) for ids, size in ((before, experts_before), (chosen, experts)))
    table += left[:half].T @ right[:half]
    likely = left[half:] @ (table / left[:half].sum(0).clamp_min(1)[:, None])
    guess = likely.topk(min(chosen.shape[1], experts), dim=1).indices
    return _recall(guess, chosen[half:])


def _recall(guess: torch.Tensor, chosen: torch.Tensor) -> float:
    used = chosen >= 0
    found = (chosen[:, :, None] == guess[:, None, :]).any(2) & used
    return float(found.sum() / used.sum().clamp_min(1))


def _indicator(ids: torch.Tensor, size: int) -> torch.Tensor:
    """float32 [R, size], 1 at the ids."""
    wide = torch.zeros(len(ids), size + 1).scatter_(1, torch.where(ids < 0, size, ids), 1.0)
    return wide[:, :size]
