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
    """A group int64 [n] for each row of `cost` [n, groups], groups of exactly `sizes` rows, of the least total cost.

    Rows choose in the order of what they lose by their second choice; rows change places in pairs, and then in rings
    of groups, as long as that lowers the cost. Where no ring does, the cost is the least one (Klein 1967).
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
    return _rotate(cost, _exchange(cost, labels, groups), groups)


def _rotate(cost: torch.Tensor, labels: torch.Tensor, groups: int) -> torch.Tensor:
    """Moves one row from each group of a ring to the next one while that lowers the total cost."""
    least = 1e-9 * float(1 + cost.abs().max())
    while True:
        change = cost - cost.gather(1, labels[:, None])
        price = torch.full((groups, groups), torch.inf, dtype=torch.float64)
        mover = torch.zeros(groups, groups, dtype=torch.int64)
        for group in range(groups):
            rows = (labels == group).nonzero()[:, 0]
            if len(rows):
                found = change[rows].min(dim=0)
                price[group], mover[group] = found.values, rows[found.indices]
        price.fill_diagonal_(torch.inf)
        ring = _negative_ring(price, least)
        if not ring:
            return labels
        for group, following in zip(ring, [*ring[1:], ring[0]], strict=True):
            labels[mover[group, following]] = following


def _negative_ring(price: torch.Tensor, least: float) -> list[int]:
    """Groups along a ring of edges [from, to] that costs less than -`least`, by Bellman and Ford; empty for none."""
    distance = torch.zeros(len(price), dtype=torch.float64)
    before = torch.full((len(price),), -1)
    for _ in range(len(price)):
        found = (distance[:, None] + price).min(dim=0)
        better = found.values < distance - least
        if not bool(better.any()):
            return []
        distance = torch.where(better, found.values, distance)
        before = torch.where(better, found.indices, before)
    at = int(better.nonzero()[0])
    for _ in range(len(price)):
        at = int(before[at])
        if at < 0:
            return []
    ring = [at]
    while int(before[ring[-1]]) != at:
        ring.append(int(before[ring[-1]]))
    ring.reverse()
    total = sum(float(price[one, other]) for one, other in zip(ring, [*ring[1:], ring[0]], strict=True))
    return ring if total < -least else []


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
