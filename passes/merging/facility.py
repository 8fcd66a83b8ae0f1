"""Facility location: which experts stay so that those served by another one lose least, solved exactly by HiGHS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from moec.errors import ResourceError


@dataclass(frozen=True)
class FacilityTable:
    """One layer: `distortion[e, d]` [E, E] is what is lost where d computes for the tokens of e.

    `required` experts stay; those of `alone` stay and compute for nobody else; at least `minimum` experts stay.
    """

    distortion: NDArray[np.float64]
    required: frozenset[int] = frozenset()
    alone: frozenset[int] = frozenset()
    minimum: int = 1

    def join(self, centres: Sequence[int]) -> tuple[int, ...]:
        """The best centre of each expert, ties to the lower index."""
        serving = [centre for centre in sorted(centres) if centre not in self.alone]
        return tuple(
            expert if expert in centres else min(serving, key=lambda centre: (self.distortion[expert, centre], centre))
            for expert in range(len(self.distortion))
        )

    def cost(self, grouping: Sequence[int]) -> float:
        """What a grouping loses."""
        return float(sum(self.distortion[expert, centre] for expert, centre in enumerate(grouping) if expert != centre))


@dataclass(frozen=True)
class FacilityPlan:
    """Centres of the experts of each layer, what they lose, and what any choice loses at least."""

    groupings: tuple[tuple[int, ...], ...]
    cost: float
    bound: float

    @property
    def gap(self) -> float:
        """(cost - bound) / cost; 0 is proven best."""
        return max(0.0, (self.cost - self.bound) / self.cost) if self.cost > 0 else 0.0


def solve_facility(tables: Sequence[FacilityTable], total: int, time_limit: float) -> FacilityPlan:
    """Exactly `total` experts stay in all layers together, of least summed distortion.

    The choice of experts is binary; who serves whom is continuous, because a best point of it is whole for any choice.
    `time_limit` in seconds. Raises ResourceError when no choice was found in time; `total` must be feasible.
    """
    scale = max((float(np.max(table.distortion, initial=0.0)) for table in tables), default=0.0) or 1.0
    program = _Program()
    stays = [program.add(len(table.distortion), 0.0, binary=True) for table in tables]
    for table, first in zip(tables, stays, strict=True):
        size = len(table.distortion)
        for expert in range(size):
            program.fix(first + expert, 1.0 if expert in table.required | table.alone else None)
        for expert in range(size):
            terms = [(first + expert, 1.0)]
            for centre in range(size):
                if centre == expert or centre in table.alone:
                    continue
                served = program.add(1, float(table.distortion[expert, centre]) / scale)
                program.constrain([(served, 1.0), (first + centre, -1.0)], -np.inf, 0.0)
                terms.append((served, 1.0))
            program.constrain(terms, 1.0, 1.0)
        program.constrain([(first + expert, 1.0) for expert in range(size)], table.minimum, size)
    every = [
        first + expert for table, first in zip(tables, stays, strict=True) for expert in range(len(table.distortion))
    ]
    program.constrain([(variable, 1.0) for variable in every], total, total)
    values, bound = program.solve(time_limit)
    groupings = tuple(
        table.join([expert for expert in range(len(table.distortion)) if values[first + expert] > 0.5])
        for table, first in zip(tables, stays, strict=True)
    )
    cost = sum(table.cost(grouping) for table, grouping in zip(tables, groupings, strict=True))
    return FacilityPlan(groupings, cost, min(cost, bound * scale))


class _Program:
    """A mixed-integer linear program as it is put together."""

    def __init__(self) -> None:
        self._costs: list[float] = []
        self._integral: list[int] = []
        self._lower: list[float] = []
        self._entries: list[tuple[int, int, float]] = []
        self._limits: list[tuple[float, float]] = []

    def add(self, count: int, cost: float, *, binary: bool = False) -> int:
        """`count` variables in 0..1; gives the first one's index."""
        self._costs += [cost] * count
        self._integral += [int(binary)] * count
        self._lower += [0.0] * count
        return len(self._costs) - count

    def fix(self, variable: int, lower: float | None) -> None:
        if lower is not None:
            self._lower[variable] = lower

    def constrain(self, terms: Sequence[tuple[int, float]], low: float, high: float) -> None:
        self._entries += [(len(self._limits), variable, factor) for variable, factor in terms]
        self._limits.append((low, high))

    def solve(self, time_limit: float) -> tuple[NDArray[np.float64], float]:
        """(values, lower bound of the cost)."""
        rows, columns, factors = zip(*self._entries, strict=True)
        matrix = coo_array((factors, (rows, columns)), shape=(len(self._limits), len(self._costs))).tocsr()
        low, high = zip(*self._limits, strict=True)
        result = milp(
            np.array(self._costs),
            integrality=np.array(self._integral),
            bounds=Bounds(np.array(self._lower), np.ones(len(self._lower))),
            constraints=LinearConstraint(matrix, np.array(low), np.array(high)),
            options={"time_limit": time_limit, "mip_rel_gap": 1e-6},
        )
        if result.x is None:
            raise ResourceError(
                f"no choice of experts was found within {time_limit:g} seconds: {result.message}",
                hint="allow more time, or choose the experts layer by layer",
            )
        bound = result.mip_dual_bound
        return result.x, float(result.fun if bound is None else bound)
