"""GPTQ: less error than nearest codes on the inputs that it saw, few tokens, and moments that break Cholesky."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moec.dialects.quant import BlockFloat, Codebook, Integer, Levels, Span, Ternary, ZeroPoint
from moec.errors import UnsafeInputError, UsageError
from moec.quantization.grids import GridSettings, TernaryFit
from moec.quantization.packed import Packed
from moec.quantization.rounding import Target, round_matrix
from moec.quantization.second_order import Fallback, round_second_order

TARGETS = {
    "int4-row": Target(Integer(4)),
    "int4": Target(Integer(4, Span.GROUP, 32, ZeroPoint.INTEGER)),
    "int3": Target(Integer(3, Span.GROUP, 32, ZeroPoint.INTEGER)),
    "int2": Target(Integer(2, Span.GROUP, 32, ZeroPoint.INTEGER)),
    "int2-row": Target(Integer(2, zero_point=ZeroPoint.INTEGER)),
    "int3-float": Target(Integer(3, Span.GROUP, 16, ZeroPoint.FLOAT)),
    "int4-tensor": Target(Integer(4, Span.TENSOR)),
    "trits": Target(Ternary(Levels.EXTREMES)),
    "trits-group": Target(Ternary(Levels.SCALE, Span.GROUP, 32), GridSettings(ternary=TernaryFit.SYMMETRIC)),
    "table": Target(Codebook(3)),
    "mxfp4": Target(BlockFloat()),
}


def correlated(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs whose spectrum decays."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    mixing *= torch.logspace(0, -2, columns, dtype=torch.float64)[:, None]
    noise = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ mixing + 0.02 * noise


def matrix(rows: int = 48, columns: int = 96, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) / columns**0.5


def output_error(packed: Packed, weight: torch.Tensor, x: torch.Tensor) -> float:
    return float(((packed.dense(torch.float64) - weight) @ x.T).norm() / (weight @ x.T).norm())


@pytest.mark.parametrize("name", list(TARGETS))
@pytest.mark.parametrize("ordered", [False, True])
def test_it_errs_less_than_nearest_codes(name: str, ordered: bool) -> None:
    weight, x = matrix(), correlated(1024, 96)
    found = round_second_order(TARGETS[name], weight, x.T @ x, ordered=ordered)
    assert found.fallback is Fallback.NONE and found.packed.problem() is None
    limit = 0.65 if name.startswith("trits") else 0.75
    assert output_error(found.packed, weight, x) < limit * output_error(round_matrix(TARGETS[name], weight), weight, x)


def test_it_is_the_plain_algorithm() -> None:
    """Column by column with the rows of the Cholesky factor of the inverse, all updates at once, in numpy."""
    weight, x = matrix(8, 64), correlated(256, 64)
    moment = x.T @ x
    found = round_second_order(TARGETS["int3"], weight, moment, damping=0.05, ordered=False).packed
    damped = moment.numpy() + 0.05 * np.trace(moment.numpy()) / 64 * np.eye(64)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    work = weight.numpy().copy()
    result = np.zeros_like(work)
    for column in range(64):
        if column % 32 == 0:
            low, high = (
                np.minimum(work[:, column : column + 32].min(1), 0),
                np.maximum(work[:, column : column + 32].max(1), 0),
            )
            scale = ((high - low) / 7).astype(np.float32).astype(np.float64)
            zero = np.clip(np.round(-low / scale), 0, 7)
        codes = np.clip(np.round(work[:, column] / scale + zero), 0, 7)
        result[:, column] = scale * (codes - zero)
        error = (work[:, column] - result[:, column]) / upper[column, column]
        work[:, column + 1 :] -= np.outer(error, upper[column, column + 1 :])
    assert np.allclose(found.dense(torch.float64).numpy(), result, atol=1e-12)


def test_uncorrelated_inputs_give_nearest_codes() -> None:
    weight = matrix()
    for name in ("int4", "trits", "mxfp4"):
        found = round_second_order(TARGETS[name], weight, torch.eye(96, dtype=torch.float64), ordered=False).packed
        nearest = round_matrix(TARGETS[name], weight)
        assert torch.equal(found.codes, nearest.codes) and torch.equal(found.scales, nearest.scales)


def test_the_size_of_inputs_does_not_matter() -> None:
    weight, x = matrix(), correlated(256, 96)
    codes = [round_second_order(TARGETS["int4"], weight, scale * (x.T @ x)).packed.codes for scale in (1, 2.0**80)]
    assert torch.equal(*codes)


def test_few_tokens_need_more_damping() -> None:
    """With 16 tokens, a hundredth of the mean is worse than nearest codes on other tokens, a tenth is not."""
    weight, x = matrix(), correlated(16, 96)
    other = correlated(1040, 96)[16:]
    target = TARGETS["int2"]
    nearest = output_error(round_matrix(target, weight), weight, other)
    errors = [
        output_error(round_second_order(target, weight, x.T @ x, damping=damping).packed, weight, other)
        for damping in (1e-4, 0.1)
    ]
    assert errors[1] < errors[0] and errors[1] < 1.02 * nearest


def test_more_tokens_err_less() -> None:
    weight, rows = matrix(), correlated(4096, 96)
    errors = []
    for count in (16, 64, 256, 2048):
        moment = rows[:count].T @ rows[:count]
        found = round_second_order(TARGETS["int3"], weight, moment).packed
        errors.append(output_error(found, weight, rows[2048:]))
    assert errors == sorted(errors, reverse=True)


def test_moments_that_are_not_positive_definite() -> None:
    weight = matrix()
    x = correlated(4, 96)
    singular = x.T @ x
    assert round_second_order(TARGETS["int4"], weight, singular).fallback is Fallback.NONE
    indefinite = singular - 3 * torch.eye(96, dtype=torch.float64) * singular.diagonal().mean() * 0.1
    assert round_second_order(TARGETS["int4"], weight, indefinite).fallback is Fallback.MORE_DAMPING
    for moment in (torch.zeros(96, 96), -singular, torch.full((96, 96), torch.nan), singular * torch.inf):
        found = round_second_order(TARGETS["int4"], weight, moment)
        assert found.fallback is Fallback.NEAREST
        assert torch.equal(found.packed.codes, round_matrix(TARGETS["int4"], weight).codes)


def test_inputs_that_are_always_zero() -> None:
    weight, x = matrix(), correlated(512, 96)
    x[:, 10:20] = 0
    found = round_second_order(TARGETS["int4-row"], weight, x.T @ x)
    assert found.packed.dense().isfinite().all()
    assert float((found.packed.dense()[:, 10:20] - weight[:, 10:20]).abs().max()) <= float(found.packed.scales.max())


@pytest.mark.parametrize("scale", [0.0, 1e30])
def test_zero_and_huge_matrices(scale: float) -> None:
    weight, x = matrix() * scale, correlated(128, 96)
    dense = round_second_order(TARGETS["int4"], weight, x.T @ x).packed.dense(torch.float64)
    assert dense.isfinite().all() and float(dense.abs().max()) <= 2 * float(weight.abs().max()) + 1e-30


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="groups of 32 do not divide"):
        round_second_order(TARGETS["int4"], matrix(4, 40), torch.eye(40), where="a matrix")
    with pytest.raises(UnsafeInputError, match="NaN or infinity"):
        round_second_order(TARGETS["int4"], matrix() * torch.nan, torch.eye(96))
    with pytest.raises(UsageError, match="column by column"):
        round_second_order(Target(Codebook(4, 2)), matrix(), torch.eye(96))
