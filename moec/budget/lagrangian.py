"""Prices for bytes and FLOPs: every item takes what is cheapest at them, and the prices rise until all fits.

Any size, no coupling: redirects are left out of the choice, but not out of the bound. What the discrete options leave
of the budget is then filled again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moec.budget.problem import OWN, Problem, Solution

_STEPS = 60
_FLOP_STEPS = 40
_NEVER = np.inf


class _Table:
    """The options of all items, padded: [items, options]."""

    def __init__(self, problem: Problem, *, own: bool) -> None:
        width = max(len(item.bytes) for item in problem.items)
        shape = (len(problem.items), width)
        self.bytes = np.zeros(shape)
        self.flops = np.zeros(shape)
        self.distortion = np.full(shape, _NEVER)
        self.own = np.zeros(shape, bool)
        for row, item in enumerate(problem.items):
            count = len(item.bytes)
            self.bytes[row, :count], self.flops[row, :count] = item.bytes, item.flops
            allowed = (item.target == OWN) if own else np.ones(count, bool)
            self.distortion[row, :count] = np.where(allowed, item.distortion, _NEVER)
            self.own[row, :count] = item.target == OWN

    def cheapest(self, byte_price: float, flop_price: float) -> tuple[NDArray[np.int64], float]:
        """(the option of each item, the least priced sum)."""
        priced = self.distortion + byte_price * self.bytes + flop_price * self.flops
        # of equal ones the smaller: a price that is just high enough must bring bytes down
        least = priced.min(axis=1)
        choices = np.where(priced == least[:, None], self.bytes, _NEVER).argmin(axis=1)
        return choices, float(least.sum())

    def total(self, column: NDArray[np.float64], choices: NDArray[np.int64]) -> float:
        return float(np.take_along_axis(column, choices[:, None], 1).sum())


def solve_lagrangian(problem: Problem) -> Solution | None:
    """A choice that keeps to all rules, and a bound; None where none was found."""
    bound = _bound(problem)
    pinned = problem
    for _ in range(len(problem.least) + 1):
        choices = _descend(pinned)
        if choices is None:
            return None
        short = _short_groups(pinned, choices)
        if not short:
            break
        kept = _pin(pinned, short)
        pinned = pinned.restricted(kept)
    else:
        return None
    chosen = refill(problem, _in_terms_of(problem, pinned, choices))
    if problem.violation(chosen):
        return None
    distortion = problem.distortion_of(chosen)
    return Solution(tuple(chosen), distortion, min(bound, distortion), "lagrangian")


def refill(problem: Problem, choices: Sequence[int]) -> list[int]:
    """Spends what is left: again and again the change that takes back most distortion per byte among those that fit."""
    table = _Table(problem, own=True)
    current = np.array(choices, np.int64)
    rows = np.arange(len(current))
    needed = np.zeros(len(current), bool)
    for item, choice in zip(problem.items, choices, strict=True):
        if item.target[choice] != OWN:
            needed[item.target[choice]] = True
    good, stored = np.zeros(table.own.shape, bool), np.zeros(table.own.shape, bool)
    for row, item in enumerate(problem.items):
        good[row, : len(item.good)], stored[row, : len(item.stored)] = item.good, item.stored
    free_bytes = problem.bytes - problem.bytes_of(choices)
    free_flops = np.inf if problem.flops is None else problem.flops - problem.flops_of(choices)
    while True:
        more = table.bytes - table.bytes[rows, current][:, None]
        work = table.flops - table.flops[rows, current][:, None]
        before = np.array([item.distortion[choice] for item, choice in zip(problem.items, current, strict=True)])
        gain = before[:, None] - table.distortion
        fits = (gain > 0) & (more <= free_bytes) & (work <= free_flops)
        fits &= good | ~needed[:, None]
        fits &= stored | ~stored[rows, current][:, None]
        if not fits.any():
            return [int(choice) for choice in current]
        rate = np.where(fits, gain / np.maximum(more, 1.0), -1.0)
        row, option = divmod(int(rate.argmax()), rate.shape[1])
        free_bytes -= int(more[row, option])
        free_flops -= float(work[row, option])
        current[row] = option


def _bound(problem: Problem) -> float:
    """The best dual value found, over all options."""
    table = _Table(problem, own=False)
    best = 0.0

    def value(byte_price: float, flop_price: float) -> float:
        _, priced = table.cheapest(byte_price, flop_price)
        return priced - byte_price * problem.bytes - flop_price * (problem.flops or 0.0)

    for flop_price in _flop_prices(problem, table):
        low, high = 0.0, _highest_price(table)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            choices, _ = table.cheapest(middle, flop_price)
            best = max(best, value(middle, flop_price))
            if table.total(table.bytes, choices) > problem.bytes:
                low = middle
            else:
                high = middle
        best = max(best, value(low, flop_price), value(high, flop_price))
    return best


def _flop_prices(problem: Problem, table: _Table) -> list[float]:
    if problem.flops is None:
        return [0.0]
    highest = _highest_price(table) * max(float(table.bytes.max()), 1.0) / max(float(table.flops.max()), 1.0)
    return [0.0, *(highest * 2.0**-step for step in range(_FLOP_STEPS))]


def _highest_price(table: _Table) -> float:
    """Nothing takes a byte more than it must at this price."""
    finite = table.distortion[np.isfinite(table.distortion)]
    steps = np.diff(np.unique(table.bytes))
    smallest = float(steps.min()) if len(steps) else 1.0
    return (float(finite.max()) + 1e-300) / smallest * 1.01


def _descend(problem: Problem) -> list[int] | None:
    """Own options that fit both budgets, at the lowest prices found."""
    table = _Table(problem, own=True)
    choices = _at_flop_price(problem, table, 0.0)
    if problem.flops is None or choices is None or table.total(table.flops, choices) <= problem.flops:
        return None if choices is None else choices.tolist()
    low, high = 0.0, 0.0
    for price in sorted(_flop_prices(problem, table)):
        found = _at_flop_price(problem, table, price)
        if found is not None and table.total(table.flops, found) <= problem.flops:
            high, choices = price, found
            break
        low = price
    else:
        return None
    for _ in range(_FLOP_STEPS):
        middle = (low + high) / 2
        found = _at_flop_price(problem, table, middle)
        if found is not None and table.total(table.flops, found) <= problem.flops:
            high, choices = middle, found
        else:
            low = middle
    result: list[int] = choices.tolist()
    return result


def _at_flop_price(problem: Problem, table: _Table, flop_price: float) -> NDArray[np.int64] | None:
    low, high = 0.0, _highest_price(table) * (1 + flop_price * float(table.flops.max()))
    choices, _ = table.cheapest(0.0, flop_price)
    if table.total(table.bytes, choices) <= problem.bytes:
        return choices
    best, _ = table.cheapest(high, flop_price)
    if table.total(table.bytes, best) > problem.bytes:
        return None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        choices, _ = table.cheapest(middle, flop_price)
        if table.total(table.bytes, choices) > problem.bytes:
            low = middle
        else:
            high, best = middle, choices
    return best


def _short_groups(problem: Problem, choices: Sequence[int]) -> list[int]:
    stored = [0] * len(problem.least)
    for item, choice in zip(problem.items, choices, strict=True):
        stored[item.group] += bool(item.stored[choice])
    return [group for group, least in enumerate(problem.least) if stored[group] < least]


def _pin(problem: Problem, groups: Sequence[int]) -> list[NDArray[np.bool_]]:
    """Leaves the items that lose most by not being stored only stored options, as many as each group needs."""
    kept = [np.ones(len(item.bytes), bool) for item in problem.items]
    for group in groups:
        members = [number for number, item in enumerate(problem.items) if item.group == group and item.stored.any()]

        def worth(number: int) -> float:
            item = problem.items[number]
            others = item.distortion[~item.stored & (item.target == OWN)]
            return float(others.min()) if len(others) else _NEVER

        for number in sorted(members, key=worth, reverse=True)[: problem.least[group]]:
            kept[number] = problem.items[number].stored
    return kept


def _in_terms_of(problem: Problem, pinned: Problem, choices: Sequence[int]) -> list[int]:
    """The same options by their numbers in the problem before it was restricted."""
    result = []
    for item, small, choice in zip(problem.items, pinned.items, choices, strict=True):
        same = (item.bytes == small.bytes[choice]) & (item.distortion == small.distortion[choice])
        same &= (item.target == small.target[choice]) & (item.stored == small.stored[choice])
        result.append(int(np.flatnonzero(same)[0]))
    return result
