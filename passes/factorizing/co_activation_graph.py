"""Neurons that are active on the same tokens, by cutting the graph of their common activations (MoEfication)."""

from __future__ import annotations

from collections.abc import Sequence

import networkx
import torch

from moec.passes.factorizing.activity import CHUNK_ROWS

_NEIGHBOURS = 16
_POWER_STEPS = 60
_PASSES = 10


def graph_groups(markers: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Neurons int64 of each group, ascending, from markers bool [n, m].

    Edges join each neuron with the 16 that it is most often active together with, and weigh how often. The graph is
    halved again and again: along the second eigenvector of its normalised adjacency, then by Kernighan and Lin's
    exchanges, which keep the sizes.
    """
    together = torch.zeros(markers.shape[1], markers.shape[1])
    for marked in torch.split(markers, CHUNK_ROWS):
        together += marked.float().T @ marked.float()
    together.fill_diagonal_(0)
    together = _strongest(together)
    groups = _halve(together, torch.arange(len(together)), list(sizes))
    return [group.sort().values for group in groups]


def cut_weight(together: torch.Tensor, groups: Sequence[torch.Tensor]) -> float:
    """The weight of the edges between different groups, of symmetric weights [m, m]."""
    inside = sum(float(together[group][:, group].sum()) for group in groups)
    return (float(together.sum()) - inside) / 2


def _strongest(together: torch.Tensor) -> torch.Tensor:
    """Symmetric weights with the strongest edges of each neuron."""
    kept = min(_NEIGHBOURS, len(together) - 1)
    order = torch.sort(together, dim=1, descending=True, stable=True).indices[:, :kept]
    mask = torch.zeros_like(together, dtype=torch.bool).scatter_(1, order, True)
    return torch.where(mask | mask.T, together, 0.0)


def _halve(together: torch.Tensor, neurons: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    if len(sizes) == 1:
        return [neurons]
    middle = len(sizes) // 2
    count = sum(sizes[:middle])
    weights = together[neurons][:, neurons]
    order = torch.sort(_second_eigenvector(weights), stable=True).indices.tolist()
    edges = [(a, b, float(weights[a, b])) for a, b in weights.nonzero().tolist() if a < b]
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(neurons)))
    graph.add_weighted_edges_from(edges)
    halves = networkx.community.kernighan_lin_bisection(
        graph, (set(order[:count]), set(order[count:])), max_iter=_PASSES, weight="weight", seed=0
    )
    if len(halves[0]) != count:  # networkx gives them in either order
        halves = halves[::-1]
    first, second = (neurons[sorted(half)] for half in halves)
    return [*_halve(together, first, sizes[:middle]), *_halve(together, second, sizes[middle:])]


def _second_eigenvector(weights: torch.Tensor) -> torch.Tensor:
    """The eigenvector of the second largest eigenvalue of the normalised adjacency, float64 [m], by power iteration."""
    degree = weights.double().sum(1).clamp(min=1e-12)
    trivial = torch.nn.functional.normalize(degree.sqrt(), dim=0)
    vector = torch.randn(len(weights), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(_POWER_STEPS):
        vector = vector - (vector @ trivial) * trivial
        spread = vector / degree.sqrt()
        # half of the identity makes all eigenvalues positive
        vector = 0.5 * vector + 0.5 * (weights @ spread.float()).double() / degree.sqrt()
        vector = torch.nn.functional.normalize(vector, dim=0)
    return vector / degree.sqrt()
