"""Factors of matrices: exact at full rank, optimal in the norm they are made for, and of the size that is said."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.errors import UsageError
from moec.passes.factoring.decomposition import RankRule, Split, decompose, factored_size, rank_for_parameters, saves
from moec.passes.factoring.joint import reduce_each, share_left, share_right
from moec.passes.factoring.shared_base import delta_rank, weighted_base
from moec.passes.factoring.whitening import Whitening, plain, whitening

OUT, IN, ROWS = 12, 9, 40
SIZES = st.tuples(st.integers(2, 14), st.integers(2, 14), st.integers(0, 2**31))


def normal(seed: int, *sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def skewed_rows(seed: int, size: int) -> torch.Tensor:
    """Rows whose directions differ in length by three orders of magnitude."""
    return normal(seed, ROWS, size) @ normal(seed + 1, size, size) * torch.logspace(0, -3, size, dtype=torch.float64)


def norm_of(rows: torch.Tensor) -> Whitening:
    found = whitening(rows.T @ rows)
    assert found is not None
    return found


@given(SIZES)
@settings(max_examples=40, deadline=None)
def test_full_rank_is_exact_in_every_norm(sizes: tuple[int, int, int]) -> None:
    """V9."""
    out, inputs, seed = sizes
    weight = normal(seed, out, inputs)
    for norm in (plain(inputs), norm_of(skewed_rows(seed, inputs))):
        for split in Split:
            product = decompose(weight, norm).factors(min(out, inputs), split).product()
            assert torch.allclose(product, weight, atol=1e-7)


@pytest.mark.parametrize("rank", range(1, IN))
@pytest.mark.parametrize("seed", range(5))
def test_each_norm_has_its_own_optimum(rank: int, seed: int) -> None:
    """V9."""
    weight, rows = normal(seed, OUT, IN), skewed_rows(seed + 9, IN)
    norm = norm_of(rows)
    whitened = weight - decompose(weight, norm).factors(rank).product()
    unwhitened = weight - decompose(weight, plain(IN)).factors(rank).product()
    assert norm.error(whitened) < norm.error(unwhitened)
    assert whitened.square().sum() > unwhitened.square().sum()
    # the norm is that of what the weight computes, and the cut singular values are the error
    assert norm.error(whitened) == pytest.approx(float((rows @ whitened.T).square().sum()), rel=1e-6)
    assert norm.error(whitened) == pytest.approx(decompose(weight, norm).error(rank), rel=1e-6)


def test_whitening_of_rows_that_miss_directions_is_finite_and_exact_at_full_rank() -> None:
    weight, rows = normal(1, OUT, IN), normal(2, 3, IN)
    norm = norm_of(rows)
    factors = decompose(weight, norm).factors(IN)
    assert torch.allclose(factors.product(), weight, atol=1e-6)
    three = decompose(weight, norm).factors(3).product()
    assert torch.allclose(rows @ three.T, rows @ weight.T, atol=1e-5)


def test_damping_is_added_to_every_direction() -> None:
    moment = torch.diag(torch.tensor([3.0, 1.0, -1e-17, 0.0], dtype=torch.float64))
    damped = whitening(moment, damping=0.1)
    assert damped is not None
    assert torch.allclose(damped.moment, moment + 0.1 * torch.eye(4, dtype=torch.float64))
    assert torch.allclose(damped.root @ damped.inverse, torch.eye(4, dtype=torch.float64))


def test_no_rows_give_no_norm_and_nan_is_an_error() -> None:
    assert whitening(torch.zeros(4, 4)) is None
    with pytest.raises(UsageError, match="not finite"):
        whitening(torch.full((2, 2), float("nan")))
    with pytest.raises(UsageError, match="NaN or infinite"):
        decompose(torch.tensor([[1.0, float("inf")]]), plain(2))


@given(st.integers(1, 40), st.integers(2, 40), st.integers(2, 40))
def test_the_rank_of_a_ratio_is_the_greatest_that_fits(percent: int, out: int, inputs: int) -> None:
    parameters = percent / 40 * out * inputs
    if parameters < out + inputs - 1e-6:
        with pytest.raises(UsageError, match="too few"):
            rank_for_parameters(parameters, out, inputs)
        return
    rank = rank_for_parameters(parameters, out, inputs)
    assert factored_size(rank, out, inputs) <= parameters + 1e-6
    assert rank == min(out, inputs) or factored_size(rank + 1, out, inputs) > parameters
    assert saves(rank, out, inputs) == (rank * (out + inputs) < out * inputs)


def test_rank_rules() -> None:
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64))
    found = decompose(weight, plain(4))
    assert RankRule(energy=1.0).of(found) == 3
    assert RankRule(energy=13 / 14).of(found) == 2
    assert RankRule(energy=9 / 14).of(found) == 1
    assert RankRule(energy=0.5).of(decompose(torch.zeros(4, 4), plain(4))) == 1
    assert RankRule(rank=4).of(found) == 4
    with pytest.raises(UsageError, match="above the full rank"):
        RankRule(rank=5).of(found)


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        (RankRule(), "one of"),
        (RankRule(rank=2, ratio=0.5), "one of"),
        (RankRule(rank=0), "below 1"),
        (RankRule(ratio=1.0), "nothing would be saved"),
        (RankRule(ratio=0.0), "not within"),
        (RankRule(energy=1.5), "not within"),
        (RankRule(energy=float("nan")), "not within"),
    ],
)
def test_rules_that_are_refused(rule: RankRule, problem: str) -> None:
    assert problem in (rule.problem() or "")


def test_base_by_number_and_by_element() -> None:
    weights = [torch.full((2, 2), 1.0), torch.full((2, 2), 3.0)]
    assert torch.equal(weighted_base(weights, [3.0, 1.0]), torch.full((2, 2), 1.5, dtype=torch.float64))
    by_element = weighted_base(
        weights, [torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [2.0, 3.0]])]
    )
    assert torch.equal(by_element, torch.tensor([[2.0, 2.0], [3.0, 2.5]], dtype=torch.float64))


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75])
def test_base_and_deltas_fill_the_ratio(ratio: float) -> None:
    rank = delta_rank(ratio, 16, 64, 64)
    size = 64 * 64 + 16 * factored_size(rank, 64, 64)
    assert size <= ratio * 16 * 64 * 64 < size + 16 * 128
    with pytest.raises(UsageError, match="too small for a base that 16 experts share"):
        delta_rank(0.06, 16, 64, 64)


def test_shared_factors_at_full_rank_are_exact_and_of_two_phases_equal_to_one() -> None:
    weights = [normal(seed, OUT, IN) for seed in range(3)]
    rows_in = [norm_of(skewed_rows(seed + 20, IN)) for seed in range(3)]
    for share, rank in ((share_right, IN), (share_left, OUT)):
        joint = share(weights, rows_in, rank)
        for weight, left, right in zip(weights, joint.left, joint.right, strict=True):
            assert torch.allclose(left @ right, weight, atol=1e-6)
        for few in (1, 4, 7):
            once = share(weights, rows_in, few)
            twice = share(reduce_each(weights, rows_in, IN), rows_in, few)
            for one, two in zip(_products(once), _products(twice), strict=True):
                assert torch.allclose(one, two, atol=1e-6)


def _products(joint: object) -> list[torch.Tensor]:
    return [left @ right for left, right in zip(joint.left, joint.right, strict=True)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_shared_factors_are_one_tensor_and_the_best_of_their_form(rank: int) -> None:
    weights = [normal(seed, OUT, IN) for seed in range(4)]
    norm = norm_of(skewed_rows(5, IN))
    joint = share_right(weights, [norm] * 4, rank)
    assert len({id(right) for right in joint.right}) == 1 and joint.right[0].shape == (rank, IN)
    # Eckart-Young for the stack in the common norm
    stacked = torch.cat(weights) @ norm.root
    expected = float(torch.linalg.svdvals(stacked)[rank:].square().sum())
    found = sum(norm.error(w - product) for w, product in zip(weights, _products(joint), strict=True))
    assert found == pytest.approx(expected, rel=1e-8)

    norms = [norm_of(skewed_rows(seed + 30, IN)) for seed in range(4)]
    other = share_left(weights, norms, rank)
    assert len({id(left) for left in other.left}) == 1 and other.left[0].shape == (OUT, rank)
    beside = torch.cat([w @ n.root for w, n in zip(weights, norms, strict=True)], dim=1)
    expected = float(torch.linalg.svdvals(beside)[rank:].square().sum())
    found = sum(n.error(w - p) for w, n, p in zip(weights, norms, _products(other), strict=True))
    assert found == pytest.approx(expected, rel=1e-8)


def test_scales_of_second_moments_decide_how_much_an_expert_counts() -> None:
    weights, rows = [normal(seed, OUT, IN) for seed in range(2)], normal(7, ROWS, IN)
    often, seldom = norm_of(rows * 10), norm_of(rows)
    joint = share_right(weights, [often, seldom], 3)
    stacked = torch.cat([weights[0] @ often.root, weights[1] @ seldom.root])
    expected = float(torch.linalg.svdvals(stacked)[3:].square().sum())
    found = sum(n.error(w - p) for w, n, p in zip(weights, [often, seldom], _products(joint), strict=True))
    assert found == pytest.approx(expected, rel=1e-8)
