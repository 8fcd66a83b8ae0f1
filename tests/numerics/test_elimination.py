"""Neurons that go while those that stay take over what they did."""

from __future__ import annotations

import itertools

import pytest
import torch

from moec.budget.elimination import eliminate
from moec.budget.local_fit import left_by_fit
from moec.budget.ridge import RIDGES, held_out_errors
from moec.passes.merging import ridge_changes

RIDGE = 0.3


def rows(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Correlated features of which some are much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, size, generator=generator, dtype=torch.float64)
    return mixed @ torch.randn(size, size, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 2, size)


def error_after_fit(hidden: torch.Tensor, columns: torch.Tensor, kept: torch.Tensor, ridge: float) -> float:
    """The squared error where the columns `kept` are fitted with the ridge that `refit-down` would have."""
    wanted, small = hidden @ columns.T, hidden[:, kept]
    lost = wanted - small @ columns[:, kept].T
    (change,) = ridge_changes(small, lost, [ridge / float(small.square().sum(0).mean())])
    return float((lost - small @ change).square().sum())


def test_energies_are_those_of_the_fit() -> None:
    hidden, columns = rows(200, 12), rows(7, 12, seed=1)
    found = eliminate(hidden, columns, [3, 9, 6], RIDGE)
    assert [len(item.kept) for item in found] == [3, 9, 6]
    for item in found:
        assert item.energy == pytest.approx(error_after_fit(hidden, columns, item.kept, RIDGE), rel=1e-8)
        left = hidden @ columns.T - hidden[:, item.kept] @ item.columns.T
        assert float(left.square().sum()) == pytest.approx(item.energy, rel=1e-8)
    assert found[0].energy > found[2].energy > found[1].energy > 0


def test_neurons_of_different_rounds_are_the_best_one_by_one() -> None:
    hidden, columns = rows(200, 6), rows(7, 6, seed=1)
    ridge = 1e-9
    left = list(range(6))
    for width, item in zip((5, 4, 3), eliminate(hidden, columns, [5, 4, 3], ridge), strict=True):
        trials = [list(kept) for kept in itertools.combinations(left, width)]
        left = min(trials, key=lambda kept: error_after_fit(hidden, columns, torch.tensor(kept), ridge))
        assert item.kept.tolist() == left


def test_what_another_neuron_does_too_goes_for_nothing() -> None:
    hidden, columns = rows(200, 8), rows(7, 8, seed=1)
    hidden[:, 5] = -2 * hidden[:, 2]
    (item,) = eliminate(hidden, columns, [7], 1e-6)
    assert item.kept.tolist() in ([0, 1, 2, 3, 4, 6, 7], [0, 1, 3, 4, 5, 6, 7])
    assert item.energy < 1e-9 * float((hidden @ columns.T).square().sum())


def test_neurons_without_activations_go_first_and_rows_may_be_missing() -> None:
    hidden, columns = rows(200, 8), rows(7, 8, seed=1)
    hidden[:, [1, 4]] = 0
    first, *_, empty = eliminate(hidden, columns, [6], RIDGE) + eliminate(hidden[:0], columns, [2], RIDGE)
    assert first.kept.tolist() == [0, 2, 3, 5, 6, 7]
    assert first.energy == pytest.approx(0, abs=1e-9)
    assert empty.energy == 0 and len(empty.kept) == 2


def test_a_fit_leaves_what_features_do_not_hold() -> None:
    features, gates = rows(100, 3), torch.linspace(0.1, 1, 100, dtype=torch.float64)
    held, beyond = features @ rows(3, 4, seed=1), rows(100, 4, seed=2)
    left = left_by_fit(features, held, gates, 1e-9)
    assert float(left.abs().max()) < 1e-6 * float(held.abs().max())
    errors = left_by_fit(features, held + beyond, gates, 1e-9) * gates[:, None]
    assert float((features * gates[:, None]).T.matmul(errors).abs().max()) < 1e-6
    assert float(errors.square().sum()) < float((beyond * gates[:, None]).square().sum())


def test_the_ridge_is_the_one_that_other_rows_prefer() -> None:
    """Neurons that are mixtures of others want it low; chance likeness on few rows wants it high."""

    def best(hidden: torch.Tensor, seen: int) -> float:
        held = torch.arange(len(hidden)) >= seen
        columns = torch.ones(5, hidden.shape[1], dtype=torch.float64)
        errors = held_out_errors(hidden, columns, held, float(hidden.square().sum(0).mean()))
        return RIDGES[int(errors.argmin())]

    some, chance = rows(400, 8), torch.Generator().manual_seed(4)
    assert best(torch.cat([some, some @ rows(8, 8, seed=2)], dim=1), 200) == RIDGES[0]
    assert best(torch.randn(200, 16, generator=chance, dtype=torch.float64), 12) > RIDGES[0]
    nobody = torch.zeros(30, dtype=torch.bool)
    assert not held_out_errors(rows(30, 6), rows(7, 6), nobody, 1.0).any()
