"""The error of a layer that has only some of its experts, tokens choosing again among them (NAEE, equation 3).

The error is the sum over sampled rows of ||y - y_S||^2, which does not depend on how rows are batched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from itertools import combinations
from math import comb

import torch

from moec.calibration.sample import LayerSample
from moec.errors import UsageError
from moec.experts import MoeLayer, load_expert
from moec.experts.run import route_inputs_of
from moec.reference.route import route

SUBSET_LIMIT = 20_000
"""At most so many subsets are tried one by one."""
_ROWS = 2048


class SubsetErrors:
    """Errors of one layer without some stored experts. Holds the outputs of all experts on up to 2048 rows."""

    def __init__(self, layer: MoeLayer, sample: LayerSample) -> None:
        step = max(len(sample) // _ROWS, 1)
        rows = torch.arange(0, len(sample), step)[:_ROWS]
        self._layer = layer
        self._inputs = route_inputs_of(layer, sample.weights, sample.router_input[rows])
        self._stored = torch.tensor(layer.stored)
        x = sample.x[rows]
        with torch.no_grad():
            outputs = [load_expert(layer, sample.weights, expert).apply(x) for expert in range(layer.expert_count)]
        # [n, E + 1, H]: the last one is what an output without an expert gives
        self._outputs = torch.stack([*outputs, torch.zeros_like(x)], dim=1)
        self._target = self._mixture(())

    def error(self, without: Collection[int]) -> float:
        """The sum of squared errors over the rows; infinite where too few outputs would be left to choose from."""
        if sum(expert not in without for expert in self._layer.stored) < self._layer.route.routing.k:
            return torch.inf
        return float((self._mixture(without) - self._target).double().square().sum())

    def _mixture(self, without: Iterable[int]) -> torch.Tensor:
        dropped = torch.zeros(self._layer.expert_count + 1, dtype=torch.bool)
        dropped[list(without)] = True
        allowed = ~dropped[self._stored]
        mask = allowed if self._inputs.mask is None else self._inputs.mask & allowed
        ids, gates, _ = route(replace(self._inputs, mask=mask), self._layer.route.routing)
        chosen = self._stored[ids]
        rows = torch.arange(len(ids))[:, None]
        return (self._outputs[rows, chosen] * gates[..., None]).sum(1)


def leave_one_out(errors: SubsetErrors, experts: int) -> torch.Tensor:
    """[E] float64: the error without each expert alone."""
    return torch.tensor([errors.error((expert,)) for expert in range(experts)], dtype=torch.float64)


def greedy_scores(errors: SubsetErrors, experts: int, keep: int, fixed: Collection[int]) -> torch.Tensor:
    """[E] float64 ranks: experts are removed one after the other, each time the one whose loss hurts least.

    The first one removed has rank 0; those that are left when `keep` are have the number of experts. `fixed` stay.
    """
    ranks = torch.full((experts,), float(experts), dtype=torch.float64)
    gone: list[int] = []
    while experts - len(gone) > keep:
        left = [expert for expert in range(experts) if expert not in gone and expert not in fixed]
        costs = [errors.error((*gone, expert)) for expert in left]
        worst = left[costs.index(min(costs))]
        ranks[worst] = len(gone)
        gone.append(worst)
    return ranks


def best_subset(errors: SubsetErrors, experts: int, keep: int, fixed: Collection[int]) -> tuple[int, ...]:
    """The `keep` experts, `fixed` among them, without whose fellows the layer errs least.

    Raises UsageError where there are more than SUBSET_LIMIT subsets.
    """
    free = [expert for expert in range(experts) if expert not in fixed]
    drop = experts - keep
    if comb(len(free), drop) > SUBSET_LIMIT:
        raise UsageError(
            f"there are {comb(len(free), drop):,} ways to keep {keep} of {experts} experts",
            hint="use criterion=naee-greedy",
        )
    gone = min(combinations(free, drop), key=errors.error)
    return tuple(expert for expert in range(experts) if expert not in gone)
