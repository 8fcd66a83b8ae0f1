"""How often an expert is in memory when a token chooses it, for caches that hold some of a model's experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

Item = tuple[int, int]
"""(layer, expert)."""


class Policy(Enum):
    """What leaves a full cache: least recently used, least frequently used, or least by HOBBIT's sum."""

    LRU = "lru"
    LFU = "lfu"
    HOBBIT = "hobbit"


@dataclass(frozen=True)
class Access:
    """A slot of a token: its layer, the expert, and whether HOBBIT would read it in its high precision."""

    layer: int
    expert: int
    important: bool


@dataclass
class _Use:
    last: int = 0
    count: int = 0
    important: int = 0


@dataclass(frozen=True)
class CachePlan:
    """What a cache of `capacity` experts would hit under the `policy` that hits most.

    `hit_rates` say for each layer by name, for each stored expert, in which share of its uses it is in memory.
    """

    policy: Policy
    capacity: int
    hit_rates: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Hits:
    """How often each expert was used, and how often it was in memory then."""

    uses: Mapping[Item, int]
    hits: Mapping[Item, int]

    @property
    def rate(self) -> float:
        """The share of all uses that hit; 0 where there are none."""
        return sum(self.hits.values()) / max(sum(self.uses.values()), 1)

    def rate_of(self, item: Item) -> float:
        """That of one expert."""
        return self.hits.get(item, 0) / max(self.uses.get(item, 0), 1)


def simulate(trace: Sequence[Access], policy: Policy, capacity: int, layers: int) -> Hits:
    """Which accesses find their expert among at most `capacity` experts of all layers; an empty start.

    HOBBIT's sum, of which the parts are published and not their weights: how recently, how often, and how often in high
    precision an expert was used, and how soon its layer comes again, each from 0 to 1 and of equal weight. Ties leave
    by layer and expert.
    """
    uses: dict[Item, _Use] = {}
    cached: set[Item] = set()
    hits: dict[Item, int] = {}
    for step, access in enumerate(trace, 1):
        item = (access.layer, access.expert)
        use = uses.setdefault(item, _Use())
        hits[item] = hits.get(item, 0) + (item in cached)
        use.last, use.count, use.important = step, use.count + 1, use.important + access.important
        if item not in cached and capacity > 0:
            if len(cached) >= capacity:
                key = _keys(policy, uses, step, access.layer, layers)
                cached.remove(min(sorted(cached), key=key))
            cached.add(item)
    return Hits({item: use.count for item, use in uses.items()}, hits)


def hit_rate(trace: Sequence[Access], policy: Policy, capacity: int, layers: int) -> float:
    """The share of accesses that `simulate` finds in memory."""
    return simulate(trace, policy, capacity, layers).rate


def _keys(policy: Policy, uses: dict[Item, _Use], step: int, layer: int, layers: int) -> Callable[[Item], float]:
    """What an expert is worth keeping for."""
    if policy is Policy.LRU:
        return lambda item: uses[item].last
    if policy is Policy.LFU:
        return lambda item: uses[item].count
    most = max(use.count for use in uses.values())
    important = max(max(use.important for use in uses.values()), 1)

    def worth(item: Item) -> float:
        use = uses[item]
        nearness = 1 - ((item[0] - layer) % layers) / layers
        return use.last / step + use.count / most + use.important / important + nearness

    return worth
