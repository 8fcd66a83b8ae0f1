"""Masks, the exact global threshold, and the second-order solve, each against its definition."""

from __future__ import annotations

import itertools

import pytest
import torch

from moec.errors import VerificationError
from moec.passes.sparsification.masks import BlockPattern, row_mask
from moec.passes.sparsification.second_order import prune_second_order
from moec.passes.sparsification.threshold import find_threshold


def inputs(rows: int, columns: int) -> torch.Tensor:
    """Rows whose columns are correlated and of different sizes."""
    few = max(columns // 4, 2)
    rank = torch.randn(rows, few, dtype=torch.float64) @ torch.randn(few, columns, dtype=torch.float64)
    return (rank + 0.3 * torch.randn(rows, columns)) * torch.linspace(0.2, 3.0, columns)


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "1:2", "4:4"])
def test_every_block_keeps_its_best_weights(text: str) -> None:
    pattern = BlockPattern.parse(text)
    scores = torch.rand(6, 16)
    blocks = pattern.mask(scores).reshape(6, -1, pattern.block)
    assert bool((blocks.sum(-1) == pattern.kept).all())
    given = scores.reshape(6, -1, pattern.block)
    worst_kept = given.masked_fill(~blocks, torch.inf).amin(-1)
    best_gone = given.masked_fill(blocks, -torch.inf).amax(-1)
    assert bool((worst_kept >= best_gone).all())
    pattern.require(scores * pattern.mask(scores), "here")
    if pattern.kept < pattern.block:
        with pytest.raises(VerificationError, match=f"the pattern is {text}"):
            pattern.require(scores, "here")


def test_equal_scores_leave_the_first_columns() -> None:
    assert BlockPattern(2, 4).mask(torch.ones(1, 8)).tolist() == [[True, True, False, False] * 2]
    assert row_mask(torch.ones(2, 5), 0.4).tolist() == [[True, True, True, False, False]] * 2


@pytest.mark.parametrize("text", ["0:4", "5:4", "2", "a:b", "2:4:8", "-1:4"])
def test_text_that_is_no_pattern(text: str) -> None:
    with pytest.raises(ValueError, match="no pattern n:m"):
        BlockPattern.parse(text)


@pytest.mark.parametrize("removed", [0, 1, 7, 250, 499])
def test_threshold_removes_exactly_so_many_of_the_lowest(removed: int) -> None:
    # many equal values, among them zero of both signs
    parts = [(torch.randint(0, 12, (10, 10)) / 7).float() for _ in range(5)]
    parts[0][0, 0], parts[1][0, 0] = -0.0, 0.0
    threshold = find_threshold(lambda: iter(parts), removed)
    masks = [threshold.mask(part) for part in parts]
    everything = torch.cat([part.flatten() for part in parts])
    mask = torch.cat([part.flatten() for part in masks])
    assert int((~mask).sum()) == removed
    if 0 < removed < 500:
        assert everything[~mask].amax() <= everything[mask].amin()


def test_threshold_of_continuous_values_is_the_sorted_one() -> None:
    parts = [torch.rand(40, 30).square() * 10.0 ** torch.randint(-6, 4, (40, 30)) for _ in range(3)]
    threshold = find_threshold(lambda: iter(parts), 1000)
    ordered = torch.cat([part.flatten() for part in parts]).sort().values
    assert threshold.value == ordered[1000]


def test_second_order_solve_is_optimal_for_the_last_column() -> None:
    """With one column to prune and one to adjust, the update is the least-squares one."""
    x = inputs(200, 2)
    moment = x.T @ x
    weight = torch.randn(3, 2, dtype=torch.float64)

    def first_goes(scores: torch.Tensor) -> torch.Tensor:
        return torch.tensor([False, True]).expand_as(scores)

    result = prune_second_order(weight, moment, first_goes, 2, damping=1e-12)
    best = weight[:, 1] + weight[:, 0] * moment[0, 1] / moment[1, 1]
    torch.testing.assert_close(result, torch.stack([torch.zeros(3, dtype=torch.float64), best], 1))


def test_second_order_error_is_below_that_of_its_rivals() -> None:
    x, weight = inputs(300, 32), torch.randn(16, 32, dtype=torch.float64)
    pattern = BlockPattern(2, 4)

    def error(pruned: torch.Tensor) -> float:
        return float(((weight - pruned) @ x.T).square().sum())

    magnitude = error(weight * pattern.mask(weight.abs()))
    wanda = error(weight * pattern.mask(weight.abs() * x.square().sum(0).sqrt()))
    solved = prune_second_order(weight, x.T @ x, pattern.mask, pattern.block)
    pattern.require(solved, "solved")
    assert error(solved) < 0.7 * wanda < 0.7 * magnitude


def test_blocks_of_columns_do_not_change_the_solve() -> None:
    """The mask of a column depends on the columns before it alone, so lazy updates equal immediate ones."""
    x, weight = inputs(100, 12), torch.randn(4, 12, dtype=torch.float64)
    order = itertools.cycle([True, False, True, True])
    fixed = torch.tensor([next(order) for _ in range(12)])

    def solve(block: int) -> torch.Tensor:
        position = itertools.count(0, block)

        def choose(scores: torch.Tensor) -> torch.Tensor:
            start = next(position)
            return fixed[start : start + block].expand_as(scores)

        return prune_second_order(weight, x.T @ x, choose, block)

    torch.testing.assert_close(solve(1), solve(12))
    torch.testing.assert_close(solve(4), solve(12))


def test_inputs_that_say_nothing_give_magnitude_pruning() -> None:
    weight = torch.randn(5, 8)
    pattern = BlockPattern(2, 4)
    result = prune_second_order(weight, torch.zeros(8, 8), pattern.mask, 4)
    assert torch.equal(result, weight * pattern.mask(weight.abs()))


def test_columns_without_input_and_repeated_columns_are_solved() -> None:
    x = inputs(20, 8)
    x[:, 3] = 0.0
    x[:, 5] = x[:, 4]
    result = prune_second_order(torch.randn(5, 8), x.T @ x, BlockPattern(2, 4).mask, 4)
    assert bool(torch.isfinite(result).all())
    BlockPattern(2, 4).require(result, "solved")
