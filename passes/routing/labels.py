"""What a router should say for each row of a layer: labels from what the experts give."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch

from moec.errors import UsageError
from moec.experts import FeedForward, MoeLayer, load_expert
from moec.passes.neuron_pruning.slicing import slice_neurons
from moec.passes.router_init.solutions import expert_importance, joined
from moec.weights.context import WeightContext

_CHUNK_ROWS = 1024
_SHARES = (1.0, 0.8, 0.6, 0.4, 0.2)


class Labels(Enum):
    """Which experts are right for a row."""

    ACTIVATION = "activation"  # by how much they give, relative to the best (MoEfication)
    NEAREST = "nearest"  # the k whose outputs are nearest to a k-th of the whole (FactorLLM's prior-approximate labels)
    BEST_SUBSET = "best-subset"  # the k that together leave the least of the layer's output, chosen greedily
    OVERLAP = "overlap"  # by how many of the most active neurons they have (Read-ME)

    @property
    def counts_experts(self) -> bool:
        """Whether the labels of a row are one for k experts and zero for the others."""
        return self in (Labels.NEAREST, Labels.BEST_SUBSET)


def experts_with_neurons(layer: MoeLayer, weights: WeightContext) -> list[FeedForward]:
    """The stored experts of a layer; raises UsageError for one without neurons."""
    experts = []
    for number in range(layer.expert_count):
        expert = load_expert(layer, weights, number)
        if not isinstance(expert, FeedForward):
            raise UsageError(f"stored expert {number} has no neurons to rank it by", where=layer.name)
        experts.append(expert)
    return experts


def labels(kind: Labels, experts: Sequence[FeedForward], rows: torch.Tensor, y: torch.Tensor, k: int) -> torch.Tensor:
    """What each of E experts is worth for rows [n, H], float32 [n, E] within 0..1, where the layer gave y [n, H].

    NEAREST and BEST_SUBSET are one for k experts of a row and zero for the others, ties going to the lower expert.
    OVERLAP is sum_n |top-n neurons of the row in S_e| / sum_n n, S_e the neurons of expert e, for n = N, .8 N, .6 N,
    .4 N and .2 N, where N are as many as an expert has on average. A neuron that several experts have is one neuron.
    """
    if kind is Labels.ACTIVATION:
        importance = expert_importance(experts, rows)
        return (importance / importance.amax(1, keepdim=True).clamp(min=1e-300)).float()
    if kind is Labels.OVERLAP:
        return _overlap(experts, rows)
    choose = _nearest if kind is Labels.NEAREST else _best_subset
    parts = []
    for part, wanted in zip(torch.split(rows, _CHUNK_ROWS), torch.split(y, _CHUNK_ROWS), strict=True):
        outputs = torch.stack([expert.apply(part.float()) for expert in experts], dim=1).double()
        chosen = choose(outputs, wanted.double(), k)
        parts.append(torch.zeros(outputs.shape[:2]).scatter_(1, chosen, 1.0))
    return torch.cat(parts)


def _overlap(experts: Sequence[FeedForward], rows: torch.Tensor) -> torch.Tensor:
    """How far the most active neurons are those of each expert: float32 [n, E] within 0..1."""
    whole, members = _distinct_neurons(experts)
    largest = max(1, round(sum(expert.width for expert in experts) / len(experts)))
    sizes = [max(1, round(share * largest)) for share in _SHARES]
    parts = []
    for part in torch.split(rows.float(), _CHUNK_ROWS):
        order = torch.sort(whole.hidden_activations(part).abs(), dim=1, descending=True, stable=True).indices
        inside = torch.stack([member[order] for member in members], dim=1).double().cumsum(2)
        counts = torch.stack([inside[:, :, size - 1] for size in sizes]).sum(0)
        parts.append((counts / sum(sizes)).float())
    return torch.cat(parts)


def _distinct_neurons(experts: Sequence[FeedForward]) -> tuple[FeedForward, list[torch.Tensor]]:
    """(a block that has each neuron of the experts once, for each expert bool [m] which of them it has)."""
    block = joined(experts)
    parts = [block.up.dense(), block.down.dense().T] + ([] if block.gate is None else [block.gate.dense()])
    _, place = torch.unique(torch.cat(parts, dim=1), dim=0, return_inverse=True)
    first = torch.full((int(place.max()) + 1,), len(place)).scatter_reduce(0, place, torch.arange(len(place)), "amin")
    members, start = [], 0
    for expert in experts:
        own = torch.zeros(len(first), dtype=torch.bool)
        own[place[start : start + expert.width]] = True
        members.append(own)
        start += expert.width
    return slice_neurons(block, first), members


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
