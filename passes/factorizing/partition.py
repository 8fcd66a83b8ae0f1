"""Partitions of neurons into groups of given sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ITERATIONS = 20


def group_sizes(width: int, groups: int) -> list[int]:
    """Sizes that differ by one at most, larger ones first; they add up to `width`."""
    return [width // groups + (number < width % groups) for number in range(groups)]


def contiguous(sizes: Sequence[int]) -> list[torch.Tensor]:
    """Neurons int64 of each group: the first ones, the next ones and so on."""
    return list(torch.split(torch.arange(sum(sizes)), list(sizes)))


def shuffled(sizes: Sequence[int], generator: torch.Generator) -> list[torch.Tensor]:
    """Neurons int64 of each group, drawn at random, ascending."""
    order = torch.randperm(sum(sizes), generator=generator)
    return [part.sort().values for part in torch.split(order, list(sizes))]


def balanced_k_means(rows: torch.Tensor, sizes: Sequence[int], generator: torch.Generator) -> list[torch.Tensor]:
    """Groups of neurons with similar rows [neurons, F], in Euclidean distance, of the sizes asked for; ascending.

    Centroids start at rows far from each other (k-means++) and move until no neuron changes its group.
    """
    rows = rows.float()
    centroids = rows[_spread_seeds(rows, len(sizes), generator)]
    labels = torch.full((len(rows),), -1)
    for _ in range(_ITERATIONS):
        distance = torch.cdist(rows, centroids).square()
        new = balanced_assignment(distance, sizes)
        if torch.equal(new, labels):
            break
        labels = new
        centroids = torch.stack([rows[labels == group].mean(0) for group in range(len(sizes))])
    return [(labels == group).nonzero()[:, 0] for group in range(len(sizes))]


def balanced_assignment(cost: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """A group int64 [n] for each row of `cost` [n, groups], groups of exactly `sizes` rows, of small total cost.

    Rows choose in the order of what they lose by their second choice; then rows change places in pairs as long as
    that lowers the cost. The result is a local optimum under exchanges of two rows.
    """
    groups = len(sizes)
    if groups == 1:
        return torch.zeros(len(cost), dtype=torch.int64)
    cost = cost.double()
    two = cost.topk(2, dim=1, largest=False).values
    order = torch.sort(two[:, 0] - two[:, 1], stable=True).indices.tolist()
    preferred = torch.sort(cost, dim=1, stable=True).indices.tolist()
    room = list(sizes)
    labels = torch.empty(len(cost), dtype=torch.int64)
    for row in order:
        group = next(group for group in preferred[row] if room[group])
        room[group] -= 1
        labels[row] = group
    return _exchange(cost, labels, groups)


def _exchange(cost: torch.Tensor, labels: torch.Tensor, groups: int) -> torch.Tensor:
    """Exchanges rows between pairs of groups while that lowers the total cost."""
    changed = True
    while changed:
        changed = False
        for one in range(groups):
            for other in range(one + 1, groups):
                left, right = (labels == one).nonzero()[:, 0], (labels == other).nonzero()[:, 0]
                # what each row gains by changing to the other group
                to_other = torch.sort(cost[left, one] - cost[left, other], descending=True, stable=True)
                to_one = torch.sort(cost[right, other] - cost[right, one], descending=True, stable=True)
                pairs = min(len(left), len(right))
                gains = to_other.values[:pairs] + to_one.values[:pairs]
                count = int((gains > 1e-9 * (1 + cost.abs().max())).sum())
                if count:
                    labels[left[to_other.indices[:count]]] = other
                    labels[right[to_one.indices[:count]]] = one
                    changed = True
    return labels


def _spread_seeds(rows: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Rows drawn with the probability of their squared distance to those drawn before (Arthur, Vassilvitskii 2007)."""
    seeds = [int(torch.randint(len(rows), (1,), generator=generator))]
    nearest = (rows - rows[seeds[0]]).square().sum(1)
    while len(seeds) < count:
        if float(nearest.sum()) > 0:
            seeds.append(int(torch.multinomial(nearest, 1, generator=generator)))
        else:
            seeds.append(next(row for row in range(len(rows)) if row not in seeds))
        nearest = torch.minimum(nearest, (rows - rows[seeds[-1]]).square().sum(1))
    return torch.tensor(seeds)
