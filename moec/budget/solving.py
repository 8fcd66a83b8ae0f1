"""Solves a problem with what fits it, and takes the best plan found."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

from moec.budget.dynamic_programming import solve_exactly
from moec.budget.lagrangian import refill, solve_lagrangian
from moec.budget.milp import solve_milp
from moec.budget.problem import Problem, Solution
from moec.errors import ResourceError


class Solver(Enum):
    """How plans are found. All but `auto` are one method."""

    AUTO = "auto"  # a Lagrangian plan always, and the exact method that fits the problem
    LAGRANGIAN = "lagrangian"
    DYNAMIC_PROGRAMMING = "dp"
    MILP = "milp"


def solve(problem: Problem, solver: Solver, *, nodes: int, gap: float) -> Solution:
    """The best plan of the methods that `solver` names, with the highest bound that they proved.

    The first option of every item is the one that keeps it; where all can be kept, they are. The problem must be
    feasible. Raises ResourceError where none of the methods found a plan.
    """
    everything = (0,) * len(problem.items)
    if not problem.violation(everything):
        return Solution(
            everything, problem.distortion_of(everything), problem.distortion_of(everything), "nothing to do"
        )
    found: list[Solution] = []
    if solver in (Solver.AUTO, Solver.LAGRANGIAN):
        found += _some(solve_lagrangian(problem))
    single = not problem.coupled and problem.flops is None
    if solver is Solver.DYNAMIC_PROGRAMMING or (solver is Solver.AUTO and single):
        found += _some(solve_exactly(problem))
    proven = bool(found) and min(solution.gap for solution in found) <= gap
    if solver is Solver.MILP or (solver is Solver.AUTO and not proven):
        found += _some(solve_milp(problem, nodes=nodes, gap=gap))
    if not found:
        raise ResourceError(f"no plan was found within {nodes} nodes", hint="allow more nodes, or a larger budget")
    best = min(found, key=lambda solution: solution.distortion)
    choices = refill(problem, best.choices)
    distortion = problem.distortion_of(choices)
    bound = max(solution.bound for solution in found)
    return replace(best, choices=tuple(choices), distortion=distortion, bound=min(bound, distortion))


def _some(solution: Solution | None) -> list[Solution]:
    return [] if solution is None else [solution]
