"""Ridge regression at reduced rank: finds what is there, does not invent where little is known."""

from __future__ import annotations

import itertools

import torch

from moec.passes.auxiliary_experts.regression import fit_affine, fit_constant


def normal(seed: int, *sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_affine_map_of_low_rank_is_found() -> None:
    x, left, right, bias = normal(0, 200, 10) + 3, normal(1, 7, 2), normal(2, 2, 10), normal(3, 7)
    targets = x @ right.T @ left.T + bias
    found = fit_affine(x, targets, normal(4, 200).square(), 2)
    assert found.left.shape == (7, 2) and found.right.shape == (2, 10)
    assert torch.allclose(found.apply(x), targets, atol=1e-3)


def test_errors_fall_with_the_rank_and_a_constant_is_rank_zero() -> None:
    x, importance = normal(0, 120, 8), normal(1, 120).square()
    targets = torch.tanh(x @ normal(2, 8, 6)) + 1

    def error(values: torch.Tensor) -> float:
        return float((importance[:, None] * (values - targets).square()).sum())

    errors = [error(fit_affine(x, targets, importance, rank).apply(x)) for rank in range(7)]
    assert all(after < before for before, after in itertools.pairwise(errors))
    constant = fit_constant(targets, importance)
    assert torch.allclose(fit_affine(x, targets, importance, 0).apply(x), constant.expand(120, 6))


def test_importance_is_how_often_a_row_counts() -> None:
    targets, counts = normal(1, 30, 4), torch.arange(30) % 3 + 1
    repeated = targets.repeat_interleave(counts, 0)
    assert torch.allclose(fit_constant(targets, counts.double()), fit_constant(repeated, torch.ones(len(repeated))))
    x = normal(0, 30, 5)
    wrong_where_it_counts_little = fit_affine(x, targets, torch.where(counts == 1, 1e-12, 1.0), 4)
    heavy = counts > 1
    alone = fit_affine(x[heavy], targets[heavy], torch.ones(int(heavy.sum())), 4)
    assert torch.allclose(wrong_where_it_counts_little.apply(x), alone.apply(x), atol=1e-6)


def test_noise_is_not_fitted() -> None:
    """More unknowns than rows and nothing to find: the penalty keeps the prediction of new rows near the mean."""
    x, targets = normal(0, 12, 40), normal(1, 12, 6)
    new_x, new_targets = normal(2, 500, 40), normal(3, 500, 6)
    found = fit_affine(x, targets, torch.ones(12), 6)
    free = torch.linalg.lstsq(x, targets, driver="gelsd").solution
    error = (found.apply(new_x) - new_targets).square().mean()
    assert error < (new_x @ free - new_targets).square().mean()
    assert error < 1.35 * (fit_constant(targets, torch.ones(12)) - new_targets).square().mean()


def test_one_row_and_equal_rows_give_their_value() -> None:
    x, targets = normal(0, 1, 5), normal(1, 1, 4)
    for count in (1, 3):
        found = fit_affine(x.expand(count, 5), targets.expand(count, 4), torch.ones(count), 2)
        assert torch.allclose(found.apply(x), targets)
        assert bool(torch.isfinite(found.left).all() and torch.isfinite(found.right).all())
