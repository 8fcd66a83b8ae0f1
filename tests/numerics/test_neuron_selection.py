"""Which neurons stay: against a ranking by hand, with protection, least widths and multiples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.errors import UsageError
from moec.passes.neuron_pruning.selection import Scope, ScoredExpert, select_neurons


def scored(*rows: list[float], layers: list[str] | None = None, protected: tuple[int, ...] = ()) -> list[ScoredExpert]:
    names = layers or ["layer"] * len(rows)
    return [
        ScoredExpert(name, number, torch.tensor(row, dtype=torch.float64), number in protected)
        for number, (name, row) in enumerate(zip(names, rows, strict=True))
    ]


def kept(experts: list[ScoredExpert], ratio: float, scope: Scope, **options: int) -> list[list[int]]:
    return [chosen.tolist() for chosen in select_neurons(experts, ratio, scope, **options)]


def test_scopes_rank_different_neurons_together() -> None:
    experts = scored([1, 2, 3, 4], [50, 60, 70, 80], [5, 6, 7, 8], layers=["a", "a", "b"])
    assert kept(experts, 0.5, Scope.EXPERT) == [[2, 3], [2, 3], [2, 3]]
    assert kept(experts, 0.25, Scope.LAYER) == [[2, 3], [0, 1, 2, 3], [1, 2, 3]]
    assert kept(experts, 0.5, Scope.GLOBAL) == [[3], [0, 1, 2, 3], [3]]


def test_round_to_only_adds_neurons_back() -> None:
    """V7."""
    experts = scored([1, 9, 2, 8, 3, 7], [10, 11, 12, 13, 14, 15])
    exact = kept(experts, 0.25, Scope.LAYER)
    rounded = kept(experts, 0.25, Scope.LAYER, round_to=4)
    assert exact == [[1, 3, 5], [0, 1, 2, 3, 4, 5]]
    assert rounded == [[1, 3, 4, 5], [0, 1, 2, 3, 4, 5]]  # the second expert has no eight neurons


def test_an_expert_without_tokens_keeps_the_least_width() -> None:
    experts = scored([0, 0, 0, 0], [3, 4, 5, 6])
    assert kept(experts, 0.5, Scope.LAYER) == [[0], [1, 2, 3]]
    assert kept(experts, 0.5, Scope.LAYER, min_width=2) == [[0, 1], [2, 3]]
    assert kept(experts, 0.5, Scope.LAYER, min_width=0) == [[], [0, 1, 2, 3]]


def test_a_layer_without_tokens_keeps_one_neuron() -> None:
    experts = scored([0, 0], [0, 0], [5, 6, 7, 8], layers=["a", "a", "b"])
    assert kept(experts, 0.375, Scope.GLOBAL, min_width=0) == [[0], [], [0, 1, 2, 3]]


def test_protected_experts_keep_all() -> None:
    experts = scored([0, 0, 0, 0], [3, 4, 5, 6], protected=(0,))
    assert kept(experts, 0.25, Scope.LAYER) == [[0, 1, 2, 3], [2, 3]]
    assert kept(experts, 0.5, Scope.EXPERT) == [[0, 1, 2, 3], [2, 3]]
    with pytest.raises(UsageError, match=r"takes 4 of 8 neurons, but only 3 may go: 4 are those of protected.*0\.3750"):
        kept(experts, 0.5, Scope.LAYER)


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(UsageError, match="expert 1 are not finite"):
        kept(scored([1, 2], [1, float("nan")]), 0.5, Scope.LAYER)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=5),
    st.floats(0, 0.99),
    st.sampled_from(list(Scope)),
    st.integers(1, 4),
)
def test_selection_against_its_definition(rows: list[list[int]], ratio: float, scope: Scope, round_to: int) -> None:
    experts = scored(*[[float(value) for value in row] for row in rows])
    total = sum(map(len, rows))
    wanted = int(ratio * total + 1e-9)
    if scope is not Scope.EXPERT and wanted > total - len(rows):
        with pytest.raises(UsageError):
            select_neurons(experts, ratio, scope)
        return
    exact = kept(experts, ratio, scope)
    removed = [sorted(set(range(len(row))) - set(chosen)) for row, chosen in zip(rows, exact, strict=True)]
    if scope is Scope.EXPERT:
        assert [len(gone) for gone in removed] == [int(ratio * len(row) + 1e-9) for row in rows]
    else:
        assert sum(map(len, removed)) == wanted
    for row, chosen, gone in zip(rows, exact, removed, strict=True):
        assert chosen and all(row[stays] >= row[goes] for stays in chosen for goes in gone)
    # V16: ranking what stayed, with nothing more to remove, changes nothing
    again = scored(*[[float(row[index]) for index in chosen] for row, chosen in zip(rows, exact, strict=True)])
    assert kept(again, 0.0, scope) == [list(range(len(chosen))) for chosen in exact]
    for row, chosen, rounded in zip(rows, exact, kept(experts, ratio, scope, round_to=round_to), strict=True):
        assert set(chosen) <= set(rounded)
        assert len(rounded) == min(len(row), -(-len(chosen) // round_to) * round_to)
