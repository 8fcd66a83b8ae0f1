"""Neurons that are active on the same tokens, by balanced clustering of their markers (CMoE)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moec.passes.factorizing.activity import CHUNK_ROWS
from moec.passes.factorizing.partition import balanced_assignment


def co_active_groups(markers: torch.Tensor, sizes: Sequence[int], iterations: int) -> list[torch.Tensor]:
    """Neurons int64 of each group, ascending, from markers bool [n, m].

    Centroids start at the markers of the neurons that are active most often; each iteration assigns all neurons at the
    least sum of L1 distances for groups of the sizes asked for, and moves centroids to the mean of their group. One
    iteration is what CMoE does; more are k-means.
    """
    groups = len(sizes)
    rate = markers.sum(0)
    seeds = torch.sort(rate, descending=True, stable=True).indices[:groups]
    centroids = markers[:, seeds].float()
    labels = torch.full((markers.shape[1],), -1)
    for _ in range(iterations):
        new = balanced_assignment(distances(markers, centroids), sizes)
        if torch.equal(new, labels):
            break
        labels = new
        centroids = _means(markers, labels, sizes)
    return [(labels == group).nonzero()[:, 0] for group in range(groups)]


def distances(markers: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """L1 distances float64 [m, groups] of markers bool [n, m] to centroids [n, groups] between 0 and 1.

    |a - c| is c where a is 0 and 1 - c where it is 1, so the sum over tokens is sum a + sum c - 2 a c.
    """
    both = torch.zeros(markers.shape[1], centroids.shape[1], dtype=torch.float64)
    for marked, centre in zip(torch.split(markers, CHUNK_ROWS), torch.split(centroids, CHUNK_ROWS), strict=True):
        both += (marked.float().T @ centre).double()
    return markers.sum(0).double()[:, None] + centroids.double().sum(0) - 2 * both


def _means(markers: torch.Tensor, labels: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Mean marker of each group, float32 [n, groups]."""
    member = torch.nn.functional.one_hot(labels, len(sizes)).float() / torch.tensor(sizes)
    return torch.cat([marked.float() @ member for marked in torch.split(markers, CHUNK_ROWS)])
