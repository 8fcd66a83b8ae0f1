"""One choice of each row of a table of costs, of least sum, whose sizes stay within a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import product

import numpy as np
import numpy.typing as npt

_MOST_UNITS = 1 << 20


class Solver(Enum):
    """DP: dynamic programming, exact. GREEDY: from the smallest sizes, the step that saves most per bit first."""

    DP = "dp"
    GREEDY = "greedy"


@dataclass(frozen=True)
class Table:
    """Costs float64 [units, choices] and sizes int64 [units, choices]; `least[choice]` units take a choice at least."""

    costs: npt.NDArray[np.float64]
    sizes: npt.NDArray[np.int64]
    budget: int
    least: Mapping[int, int] = field(default_factory=dict)

    def allows(self, choices: Sequence[int]) -> bool:
        """Whether budget and numbers hold."""
        size = int(self.sizes[np.arange(len(choices)), list(choices)].sum())
        return size <= self.budget and all(list(choices).count(choice) >= count for choice, count in self.least.items())

    def cost(self, choices: Sequence[int]) -> float:
        """The sum of the costs."""
        return float(self.costs[np.arange(len(choices)), list(choices)].sum())


def solve(table: Table, solver: Solver) -> tuple[int, ...] | None:
    """A choice for each unit, ties to the lower one; None where nothing keeps to budget and numbers."""
    found = _exact(table) if solver is Solver.DP else None
    # sizes that had to be rounded up may leave dynamic programming without a choice where there is one
    return _greedy(table) if found is None else found


def _exact(table: Table) -> tuple[int, ...] | None:
    """The state is what was spent, and how many units took each choice that needs some, up to the number it needs."""
    units, choices = table.costs.shape
    unit = math.gcd(*(int(size) for size in table.sizes.ravel())) or 1
    sizes, capacity = table.sizes // unit, table.budget // unit
    if capacity < 0 or capacity > _MOST_UNITS:
        # coarser sizes, rounded up, so that the budget holds all the same
        unit = -(-table.budget // _MOST_UNITS)
        sizes, capacity = -(-table.sizes // max(unit, 1)), table.budget // max(unit, 1)
        if capacity < 0:
            return None
    needed = [(choice, count) for choice, count in sorted(table.least.items()) if count > 0]
    states = list(product(*(range(count + 1) for _, count in needed)))
    number = {state: place for place, state in enumerate(states)}
    best = np.full((len(states), capacity + 1), np.inf)
    best[0] = 0.0
    taken = np.full((units, len(states), capacity + 1), -1, np.int16)
    came_from = np.zeros((units, len(states), capacity + 1), np.int16)
    for place in range(units):
        following = np.full_like(best, np.inf)
        for choice in range(choices):
            size = int(sizes[place, choice])
            if size > capacity:
                continue
            for state, old in number.items():
                moved = tuple(
                    min(count + (choice == wanted), limit) for count, (wanted, limit) in zip(state, needed, strict=True)
                )
                new = number[moved]
                cost = best[old, : capacity + 1 - size] + table.costs[place, choice]
                better = cost < following[new, size:]
                following[new, size:][better] = cost[better]
                taken[place, new, size:][better] = choice
                came_from[place, new, size:][better] = old
        best = following
    at, left = len(states) - 1, capacity
    if not np.isfinite(best[at, left]):
        return None
    result = []
    for place in range(units - 1, -1, -1):
        choice = int(taken[place, at, left])
        result.append(choice)
        at, left = int(came_from[place, at, left]), left - int(sizes[place, choice])
    return tuple(reversed(result))


def _greedy(table: Table) -> tuple[int, ...] | None:
    units, choices = table.costs.shape
    current = [int(choice) for choice in table.sizes.argmin(1)]
    while True:
        spent = int(table.sizes[np.arange(units), current].sum())
        best: tuple[float, int, int] | None = None
        for place, now in enumerate(current):
            for choice in range(choices):
                more = int(table.sizes[place, choice] - table.sizes[place, now])
                gain = float(table.costs[place, now] - table.costs[place, choice])
                if more > 0 and gain > 0 and spent + more <= table.budget:
                    step = (-gain / more, place, choice)
                    best = step if best is None or step < best else best
        if best is None:
            return tuple(current) if table.allows(current) else None
        current[best[1]] = best[2]
