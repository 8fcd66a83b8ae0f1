"""Codes and scales in turn: never worse for any row, each step the best there is, and what stays."""

from __future__ import annotations

import itertools

import pytest
import torch

from moec.dialects.quant import Integer, Span, ZeroPoint
from moec.quantization.descent import descend
from moec.quantization.packed import Packed
from moec.quantization.rounding import Target, pack, round_groups, round_matrix
from moec.quantization.second_order import round_second_order
from tests.numerics.test_second_order import TARGETS, correlated, matrix

INTEGERS = [name for name, target in TARGETS.items() if isinstance(target.format, Integer)]


def row_errors(packed: Packed, weight: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    change = packed.dense(torch.float64) - weight
    return ((change @ moment) * change).sum(1)


@pytest.mark.parametrize("name", INTEGERS)
def test_no_row_errs_more_and_all_together_much_less(name: str) -> None:
    weight, x = matrix(), correlated(1024, 96)
    moment = x.T @ x / 1024 + 1e-4 * torch.eye(96, dtype=torch.float64)
    start = round_second_order(TARGETS[name], weight, moment, damping=1e-6).packed
    errors = [row_errors(start, weight, moment)]
    for rounds in (1, 3):
        found = round_second_order(TARGETS[name], weight, moment, damping=1e-6, rounds=rounds).packed
        assert found.problem() is None
        errors.append(row_errors(found, weight, moment))
        assert bool((errors[-1] <= errors[-2] * (1 + 1e-6) + 1e-12).all())
    assert errors[-1].sum() < (0.99 if "4" in name or name == "int2-row" else 0.95) * errors[0].sum()


def test_codes_end_where_no_single_one_can_do_better() -> None:
    weight, x = matrix(6, 32), correlated(256, 32)
    moment = x.T @ x / 256
    target = Target(Integer(2, Span.TENSOR))
    grid, codes = round_groups(target, weight)
    grid, codes = descend(grid, codes, weight, moment, 30)
    reached = row_errors(pack(target, 32, grid, codes), weight, moment)
    for column, code in itertools.product(range(32), range(4)):
        other = codes.clone()
        other[:, column] = code
        assert bool((row_errors(pack(target, 32, grid, other), weight, moment) >= reached - 1e-12).all())


def test_scales_are_those_of_least_squares() -> None:
    """With one group in a row the best scale is a quotient; unrelated inputs leave nearest codes where they are."""
    weight = matrix(5, 16)
    target = Target(Integer(8, zero_point=ZeroPoint.INTEGER))
    grid, codes = round_groups(target, weight)
    moment = torch.eye(16, dtype=torch.float64)
    found, again = descend(grid, codes, weight, moment, 1)
    assert torch.equal(codes, again)
    unit = grid.decode(codes[:, None])[:, 0] / grid.scale[:, 0].double()
    assert grid.zero is not None and torch.equal(found.zero, grid.zero)
    best = (unit * weight).sum(1) / unit.square().sum(1)
    assert torch.allclose(found.scale[:, 0, 0].double(), best, rtol=1e-6)


def test_groups_of_zeros_keep_their_scales() -> None:
    weight = matrix(4, 64)
    weight[:, 32:] = 0
    target = TARGETS["int3"]
    moment = torch.eye(64, dtype=torch.float64)
    start, found = round_matrix(target, weight), round_second_order(target, weight, moment, rounds=2).packed
    assert found.problem() is None
    assert torch.equal(found.scales[:, 1], start.scales[:, 1])
    assert bool((found.dense()[:, 32:] == 0).all())
