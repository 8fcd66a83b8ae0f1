"""Exact for one budget of bytes and independent items: the least distortion for every number of bytes."""

from __future__ import annotations

import math

import numpy as np

from moec.budget.problem import OWN, Problem, Solution

MOST_UNITS = 1 << 16
"""Budgets are counted in units, so that there are at most so many; bytes are rounded up to them."""


def solve_exactly(problem: Problem) -> Solution | None:
    """The best choice without redirects; None where there is none, or where it stores too few experts of a group.

    It is proven best where bytes are whole units, which they are for at most `MOST_UNITS` units.
    """
    sizes = [int(size) for item in problem.items for size in item.bytes[item.target == OWN]]
    unit = math.gcd(*sizes) or 1
    exact = problem.bytes // unit <= MOST_UNITS
    if not exact:
        unit = -(-problem.bytes // MOST_UNITS)
    capacity = problem.bytes // unit
    best = np.zeros(capacity + 1)
    taken: list[np.ndarray[tuple[int], np.dtype[np.int16]]] = []
    for item in problem.items:
        improved = np.full(capacity + 1, np.inf)
        option = np.full(capacity + 1, -1, np.int16)
        for number in np.flatnonzero(item.target == OWN).tolist():
            size = -(-int(item.bytes[number]) // unit)
            if size > capacity:
                continue
            cost = best[: capacity + 1 - size] + item.distortion[number]
            better = cost < improved[size:]
            improved[size:][better] = cost[better]
            option[size:][better] = number
        best = improved
        taken.append(option)
    if not np.isfinite(best[capacity]):
        return None
    choices: list[int] = []
    left = capacity
    for item, option in zip(reversed(problem.items), reversed(taken), strict=True):
        number = int(option[left])
        choices.append(number)
        left -= -(-int(item.bytes[number]) // unit)
    choices.reverse()
    if problem.violation(choices):
        return None
    distortion = problem.distortion_of(choices)
    proven = exact and not problem.coupled and problem.flops is None
    return Solution(tuple(choices), distortion, distortion if proven else 0.0, "dynamic programming")
