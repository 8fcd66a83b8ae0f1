"""Which heads of attention go together: by their place, their weights, or what they do on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from moec.experts.heads import AttentionHeads
from moec.passes.factorizing.activity import CHUNK_ROWS, Observed
from moec.passes.factorizing.co_activation import co_active_groups
from moec.passes.factorizing.co_activation_graph import graph_groups
from moec.passes.factorizing.division import Division, Partition
from moec.passes.factorizing.importance import require_gradient, text_clusters
from moec.passes.factorizing.partition import balanced_assignment, balanced_k_means, contiguous, shuffled
from moec.weights.context import WeightContext


def divide_heads(
    division: Division,
    heads: AttentionHeads,
    weights: WeightContext,
    sizes: Sequence[int],
    text: Callable[[], Observed],
    generator: torch.Generator,
) -> list[torch.Tensor]:
    """Units (query heads with one key) int64 of each group, ascending, in groups of `sizes`.

    A unit's activity on a token is the length of what it adds to the output. `text` is asked for where it is needed;
    raises UsageError where it has no gradients, or too few sequences.
    """
    match division.partition:
        case Partition.CONTIGUOUS:
            return contiguous(sizes)
        case Partition.RANDOM:
            return shuffled(sizes, generator)
        case Partition.K_MEANS:
            rows = heads.load_units(weights).flatten(1)
            return balanced_k_means(torch.nn.functional.normalize(rows, dim=1), sizes, generator)
    observed = text()
    if division.partition is Partition.GRADIENT:
        kinds = text_clusters(observed, len(sizes), generator, heads.name)
        gradient = require_gradient(observed, heads.name)
        worth = _by_unit(heads, weights, observed.x, gradient)
        total = torch.zeros(len(sizes), heads.units, dtype=torch.float64).index_add_(0, kinds, worth)
        mean = total / torch.bincount(kinds, minlength=len(sizes)).clamp(min=1)[:, None]
        share = mean / mean.sum(1, keepdim=True).clamp(min=1e-300)
        labels = balanced_assignment(-share.T, sizes)
        return [(labels == group).nonzero()[:, 0] for group in range(len(sizes))]
    strength = _by_unit(heads, weights, observed.x, None)
    active = min(division.active or max(1, heads.units // len(sizes)), heads.units)
    marked = torch.zeros_like(strength, dtype=torch.bool)
    marked.scatter_(1, strength.topk(active, dim=1).indices, True)
    if division.partition is Partition.CO_ACTIVATION:
        return co_active_groups(marked, sizes, division.iterations)
    return graph_groups(marked, sizes)


def _by_unit(
    heads: AttentionHeads, weights: WeightContext, x: torch.Tensor, gradient: torch.Tensor | None
) -> torch.Tensor:
    """||O_u x_u|| of each unit, or |<O_u x_u, g>| for the derivative g of the loss, float64 [n, units]."""
    columns = heads.load_units(weights)
    parts = []
    for start in range(0, len(x), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        given = x[rows].float().reshape(-1, heads.units, heads.unit_size)
        added = torch.einsum("nuc,uhc->nuh", given, columns)
        if gradient is None:
            parts.append(added.norm(dim=2).double())
        else:
            parts.append(torch.einsum("nuh,nh->nu", added, gradient[rows].float()).abs().double())
    return torch.cat(parts)
