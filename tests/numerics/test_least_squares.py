"""The solver behind refit-down."""

from __future__ import annotations

import pytest
import torch

from moec.passes.merging import held_out_rows, mean_square, ridge_changes


def change(features: torch.Tensor, residual: torch.Tensor, ridge: float) -> torch.Tensor:
    (found,) = ridge_changes(features, residual, [ridge])
    return found


def test_a_linear_map_is_found() -> None:
    features = torch.randn(200, 10)
    wanted = torch.randn(10, 4)
    torch.testing.assert_close(change(features, features @ wanted, 1e-9).float(), wanted, rtol=1e-4, atol=1e-5)


def test_nothing_to_explain_changes_nothing() -> None:
    assert not change(torch.randn(50, 6), torch.zeros(50, 3), 1e-3).any()
    assert not change(torch.zeros(50, 6), torch.randn(50, 3), 1e-3).any()


def test_features_that_never_act_keep_their_weights() -> None:
    features = torch.randn(50, 6)
    features[:, 2] = 0
    found = change(features, torch.randn(50, 3), 1e-3)
    assert not found[2].any() and found[[0, 1, 3, 4, 5]].all()


def test_fewer_rows_than_features_have_a_solution() -> None:
    assert bool(torch.isfinite(change(torch.randn(4, 30), torch.randn(4, 2), 1e-3)).all())


def test_a_larger_ridge_changes_less() -> None:
    features, residual = torch.randn(100, 8), torch.randn(100, 3)
    norms = [float(found.norm()) for found in ridge_changes(features, residual, (1e-3, 1.0, 100.0))]
    assert norms[0] > norms[1] > norms[2]


def test_mean_square_is_over_rows() -> None:
    assert mean_square(torch.tensor([[3.0, 4.0], [0.0, 0.0]])) == 12.5


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_whole_sequences_are_held_out(share: float) -> None:
    sequence = torch.arange(40).repeat_interleave(25)[torch.randperm(1000)]
    held = held_out_rows(sequence, share, torch.Generator().manual_seed(1))
    assert float(held.float().mean()) == pytest.approx(share, abs=0.03)
    assert not set(sequence[held].tolist()) & set(sequence[~held].tolist())


def test_of_one_sequence_the_last_rows_are_held_out() -> None:
    held = held_out_rows(torch.zeros(10, dtype=torch.int64), 0.2, torch.Generator())
    assert held.tolist() == [False] * 8 + [True] * 2
