"""What a router should say for each row of a layer: labels from what the experts give."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch

from moec.experts import FeedForward
from moec.passes.router_init.solutions import expert_importance

_CHUNK_ROWS = 1024


class Labels(Enum):
    """Which experts are right for a row."""

    ACTIVATION = "activation"  # by how much they give, relative to the best (MoEfication)
    NEAREST = "nearest"  # the k whose outputs are nearest to a k-th of the whole (FactorLLM's prior-approximate labels)
    BEST_SUBSET = "best-subset"  # the k that together leave the least of the layer's output, chosen greedily


def labels(kind: Labels, experts: Sequence[FeedForward], rows: torch.Tensor, y: torch.Tensor, k: int) -> torch.Tensor:
    """What each of E experts is worth for rows [n, H], float32 [n, E] within 0..1, where the layer gave y [n, H].

    NEAREST and BEST_SUBSET are one for k experts of a row and zero for the others, ties going to the lower expert.
    """
    if kind is Labels.ACTIVATION:
        importance = expert_importance(experts, rows)
        return (importance / importance.amax(1, keepdim=True).clamp(min=1e-300)).float()
    choose = _nearest if kind is Labels.NEAREST else _best_subset
    parts = []
    for part, wanted in zip(torch.split(rows, _CHUNK_ROWS), torch.split(y, _CHUNK_ROWS), strict=True):
        outputs = torch.stack([expert.apply(part.float()) for expert in experts], dim=1).double()
        chosen = choose(outputs, wanted.double(), k)
        parts.append(torch.zeros(outputs.shape[:2]).scatter_(1, chosen, 1.0))
    return torch.cat(parts)


def _nearest(outputs: torch.Tensor, y: torch.Tensor, k: int) -> torch.Tensor:
    """The k of outputs [n, E, H] with the least mean squared distance from y k / E: int64 [n, k]."""
    target = y * (k / outputs.shape[1])
    distance = (outputs - target[:, None]).square().mean(2)
    return torch.sort(distance, dim=1, stable=True).indices[:, :k]


def _best_subset(outputs: torch.Tensor, y: torch.Tensor, k: int) -> torch.Tensor:
    """k of outputs [n, E, H], one after the other the one behind which the least of y is left: int64 [n, k]."""
    left, taken = y.clone(), torch.zeros(outputs.shape[:2], dtype=torch.bool)
    chosen = []
    for _ in range(k):
        distance = (left[:, None] - outputs).square().sum(2).masked_fill(taken, torch.inf)
        best = torch.sort(distance, dim=1, stable=True).indices[:, :1]
        chosen.append(best)
        taken.scatter_(1, best, True)
        left = left - outputs.gather(1, best[:, :, None].expand(-1, -1, outputs.shape[2]))[:, 0]
    return torch.cat(chosen, dim=1)
