"""The whole problem, redirects and both budgets included, as a mixed-integer linear program for HiGHS."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from moec.budget.problem import OWN, Problem, Solution

_OBJECTIVE_SCALE = 1e3  # HiGHS works with absolute tolerances of 1e-6


class _Rows:
    """Constraints low <= sum of factor * variable <= high, as they are put together."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, int, float]] = []
        self.low: list[float] = []
        self.high: list[float] = []

    def add(self, terms: list[tuple[int, float]], low: float, high: float) -> None:
        self.entries += [(len(self.low), variable, factor) for variable, factor in terms]
        self.low.append(low)
        self.high.append(high)


def solve_milp(problem: Problem, *, nodes: int, gap: float) -> Solution | None:
    """The best choice that HiGHS finds in a tree of so many nodes or proves within `gap`; None where it finds none.

    Equal problems have equal results on every machine, which a limit of time would not give.
    """
    starts = np.concatenate([[0], np.cumsum([len(item.bytes) for item in problem.items])])
    rows = _Rows()
    for number, item in enumerate(problem.items):
        first = int(starts[number])
        rows.add([(first + option, 1.0) for option in range(len(item.bytes))], 1.0, 1.0)
        for option in np.flatnonzero(item.target != OWN).tolist():
            target = int(item.target[option])
            serving = np.flatnonzero(problem.items[target].good) + int(starts[target])
            rows.add([(first + option, 1.0), *((int(variable), -1.0) for variable in serving)], -np.inf, 0.0)
    every = [(item, option, int(starts[number]) + option) for number, item in enumerate(problem.items) for option in
             range(len(item.bytes))]  # fmt: skip
    scale = max(problem.bytes, 1)
    rows.add([(at, float(item.bytes[option]) / scale) for item, option, at in every], -np.inf, problem.bytes / scale)
    if problem.flops is not None:
        work = problem.flops or 1.0
        rows.add([(at, float(item.flops[option]) / work) for item, option, at in every], -np.inf, problem.flops / work)
    for group, least in enumerate(problem.least):
        stored = [(at, 1.0) for item, option, at in every if item.group == group and item.stored[option]]
        if least:
            rows.add(stored, float(least), np.inf)
    costs = np.concatenate([item.distortion for item in problem.items])
    largest = float(costs.max()) or 1.0
    places = np.array(rows.entries)
    matrix = coo_array(
        (places[:, 2], (places[:, 0].astype(int), places[:, 1].astype(int))), shape=(len(rows.low), len(costs))
    )
    result = milp(
        costs / largest * _OBJECTIVE_SCALE,
        integrality=np.ones(len(costs)),
        bounds=Bounds(0.0, 1.0),
        constraints=LinearConstraint(matrix.tocsr(), np.array(rows.low), np.array(rows.high)),
        options={"node_limit": nodes, "mip_rel_gap": gap},
    )
    if result.x is None:
        return None
    choices = tuple(int(result.x[starts[number] : starts[number + 1]].argmax()) for number in range(len(problem.items)))
    if problem.violation(choices):
        return None
    distortion = problem.distortion_of(choices)
    bound = 0.0 if result.mip_dual_bound is None else float(result.mip_dual_bound) * largest / _OBJECTIVE_SCALE
    return Solution(choices, distortion, min(max(bound, 0.0), distortion), "HiGHS")
