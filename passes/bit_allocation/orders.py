"""Which experts lose bits first, by what it costs to take them from one or from two, and how many may."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sensitivities:
    """What fewer bits cost: `singles` for each unit alone, `pairs` what two cost more than each alone (i < j).

    The cost of a set is the sum of both over its members, the second order of a loss in what rounding changes (after
    Hessians that are augmented by dependencies between layers). Pairs that are not named cost nothing more.
    """

    singles: Sequence[float]
    pairs: Mapping[tuple[int, int], float] = field(default_factory=dict)

    def of(self, chosen: Sequence[int]) -> float:
        """The cost of a set of units."""
        members = sorted(chosen)
        both = sum(self.pairs.get((i, j), 0.0) for place, i in enumerate(members) for j in members[place + 1 :])
        return sum(self.singles[i] for i in members) + both

    def order(self) -> list[int]:
        """All units, always the one next that costs least beside those before it; ties to the lower one."""
        left, chosen = list(range(len(self.singles))), list[int]()
        more = list(self.singles)
        while left:
            best = min(left, key=lambda unit: (more[unit], unit))
            left.remove(best)
            chosen.append(best)
            for unit in left:
                more[unit] += self.pairs.get((min(unit, best), max(unit, best)), 0.0)
        return chosen


def longest_prefix(length: int, loss: Callable[[int], float], most: float) -> int:
    """The largest m up to `length` with loss(m) <= most, found by halving: O(log length) losses, which should rise
    with m. That m = 0 keeps to it is taken for granted; loss(m) and loss(m + 1) are measured in the end."""
    low, high = 0, length + 1
    while high - low > 1:
        middle = (low + high) // 2
        if loss(middle) <= most:
            low = middle
        else:
            high = middle
    return low
