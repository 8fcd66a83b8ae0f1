"""Solvers of the budget against every choice there is, on random small problems."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from moec.budget.dynamic_programming import solve_exactly
from moec.budget.lagrangian import solve_lagrangian
from moec.budget.milp import solve_milp
from moec.budget.problem import OWN, Item, Problem
from moec.budget.solving import Solver, solve
from moec.errors import ResourceError

NODES, GAP = 1000, 1e-9
SEEDS = range(6)


def problem(
    seed: int, *, groups: int = 2, experts: int = 3, redirects: bool = False, flops: bool = False, share: float = 0.5
) -> Problem:
    """Experts that may stay, lose neurons, become a constant or nothing, or be redirected within their group."""
    generator = np.random.default_rng(seed)
    items = []
    for number in range(groups * experts):
        group, size = number // experts, int(generator.integers(20, 60)) * 8
        loss = float(generator.lognormal(0, 1))
        parts = np.array([8, 6, 4, 2])
        sizes = [*(size * parts // 8), 16, 0]
        losses = [*(loss * (1 - parts / 8) ** 2), loss * 0.8, loss]
        others = [other for other in range(group * experts, (group + 1) * experts) if other != number]
        targets = [OWN] * len(sizes)
        if redirects:
            sizes += [0] * len(others)
            losses += list(loss * generator.uniform(0.05, 2.0, len(others)))
            targets += others
        count = len(sizes)
        items.append(
            Item(
                group,
                np.array(sizes, np.int64),
                np.array(sizes, np.float64) * float(generator.uniform(0.1, 1.0)),
                np.array(losses),
                np.array(targets, np.int64),
                np.arange(count) < 4,
                np.arange(count) < 2,
            )
        )
    budget = int(share * sum(int(item.bytes[0]) for item in items))
    work = 0.4 * sum(float(item.flops[0]) for item in items) if flops else None
    return Problem(tuple(items), budget, work, (1,) * groups)


def best_of_all(given: Problem) -> float:
    """By trying everything."""
    ranges = [range(len(item.bytes)) for item in given.items]
    kept = (choices for choices in itertools.product(*ranges) if not given.violation(choices))
    return min((given.distortion_of(choices) for choices in kept), default=np.inf)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_dynamic_programming_and_milp_find_the_optimum(seed: int, share: float) -> None:
    given = problem(seed, share=share)
    optimum = best_of_all(given)
    milp = solve_milp(given, nodes=NODES, gap=GAP)
    assert milp is not None and milp.distortion == pytest.approx(optimum, rel=1e-9)
    dp = solve_exactly(given)
    if dp is not None:  # it does not know that a group needs an expert
        assert dp.distortion == pytest.approx(optimum, rel=1e-9)
        assert dp.gap == 0
    assert solve(given, Solver.AUTO, nodes=NODES, gap=GAP).distortion == pytest.approx(optimum, rel=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_milp_finds_the_optimum_with_redirects(seed: int) -> None:
    given = problem(seed, redirects=True, experts=2 if seed % 2 else 3, groups=2 if seed % 2 else 1, share=0.45)
    optimum = best_of_all(given)
    found = solve(given, Solver.AUTO, nodes=NODES, gap=GAP)
    assert found.distortion == pytest.approx(optimum, rel=1e-9)
    assert found.bound <= optimum * (1 + 1e-6)
    own = given.restricted([item.target == OWN for item in given.items])
    assert found.distortion <= solve(own, Solver.AUTO, nodes=NODES, gap=GAP).distortion + 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_milp_finds_the_optimum_under_two_budgets(seed: int) -> None:
    given = problem(seed, groups=1, experts=4, flops=True)
    optimum = best_of_all(given)
    assert solve(given, Solver.MILP, nodes=NODES, gap=GAP).distortion == pytest.approx(optimum, rel=1e-9)
    prices = solve_lagrangian(given)
    assert prices is not None
    assert optimum * (1 - 1e-9) <= prices.distortion <= 1.5 * optimum
    assert prices.bound <= optimum * (1 + 1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_prices_and_refill_come_near_and_beat_greedy(seed: int) -> None:
    """At 64 experts the discrete options hardly matter; greedy removal of the cheapest next step is no better."""
    given = problem(seed, groups=4, experts=16)
    exact = solve_exactly(given)
    prices = solve_lagrangian(given)
    assert exact is not None and prices is not None
    assert prices.bound <= exact.distortion * (1 + 1e-9)
    assert exact.distortion * (1 - 1e-9) <= prices.distortion <= 1.01 * exact.distortion
    greedy = greedy_removal(given)
    assert exact.distortion <= greedy * (1 + 1e-9)
    assert prices.distortion <= greedy * 1.001


def greedy_removal(given: Problem) -> float:
    """From everything kept, always the step that loses least per byte, until it fits."""
    choices = [0] * len(given.items)
    while given.bytes_of(choices) > given.bytes:
        steps = []
        for number, item in enumerate(given.items):
            for option in np.flatnonzero((item.target == OWN) & (item.bytes < item.bytes[choices[number]])).tolist():
                saved = int(item.bytes[choices[number]] - item.bytes[option])
                lost = float(item.distortion[option] - item.distortion[choices[number]])
                steps.append((lost / saved, number, option))
        _, number, option = min(steps)
        choices[number] = option
    return given.distortion_of(choices)


def test_every_group_keeps_as_many_stored_as_it_needs() -> None:
    """A group that costs next to nothing to lose."""
    given = problem(3, groups=2, experts=4, share=0.3)
    cheap = tuple(
        item if item.group else Item(item.group, item.bytes, item.flops, item.distortion * 1e-9, *_rest(item))
        for item in given.items
    )
    needy = Problem(cheap, given.bytes, None, (2, 2))
    assert solve_exactly(needy) is None
    for solver in (Solver.LAGRANGIAN, Solver.MILP, Solver.AUTO):
        found = solve(needy, solver, nodes=NODES, gap=GAP)
        assert needy.violation(found.choices) == ""


def _rest(item: Item) -> tuple[Any, Any, Any]:
    return item.target, item.stored, item.good


@pytest.mark.parametrize("seed", SEEDS)
def test_the_minimum_is_the_least_that_any_choice_takes(seed: int) -> None:
    given = problem(seed, redirects=True, experts=2)
    ranges = [range(len(item.bytes)) for item in given.items]
    free = Problem(given.items, 10**12, None, given.least)
    sizes = [given.bytes_of(choices) for choices in itertools.product(*ranges) if not free.violation(choices)]
    least = given.minimum_bytes()
    assert least == min(sizes)
    tight = Problem(given.items, least, None, given.least)
    assert not tight.violation(solve(tight, Solver.AUTO, nodes=NODES, gap=GAP).choices)
    with pytest.raises(ResourceError):
        solve(Problem(given.items, least - 1, None, given.least), Solver.AUTO, nodes=NODES, gap=GAP)


def test_a_budget_for_all_keeps_all() -> None:
    given = problem(1, redirects=True, share=1.0)
    found = solve(given, Solver.AUTO, nodes=NODES, gap=GAP)
    assert set(found.choices) == {0}
    assert found.distortion == found.gap == 0
