"""Factors of matrices and modules for low ranks: which form loses less on trained models, over seeds of calibration."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.quality.harness import compress, increases

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("quality-factoring")]

_MODELS = ("scratch", "upcycled")
_RATIOS = (0.75, 0.5, 0.25)


def _low_rank(name: str, options: str) -> NDArray[np.float64]:
    return increases(name, f"low-rank{{{options}}}")


def _latent(name: str, ratio: float, basis: str) -> NDArray[np.float64]:
    return increases(name, f"latent-factorize{{ratio={ratio} sides=gate,up,down basis={basis}}}")


def _auxiliary(name: str, options: str) -> NDArray[np.float64]:
    return increases(name, f"replace-auxiliary{{main=1 {options}}}")


@pytest.mark.parametrize("ratio", _RATIOS)
@pytest.mark.parametrize("name", _MODELS)
def test_a_basis_of_what_is_computed_is_better_than_that_of_the_weights(name: str, ratio: float) -> None:
    plain, whitened, gated = (
        _low_rank(name, f"ratio={ratio} basis={basis}") for basis in ("plain", "whitened", "gate-whitened")
    )
    assert (whitened < 0.8 * plain).all()
    assert (gated < 0.98 * whitened).all()


@pytest.mark.parametrize("ratio", _RATIOS)
def test_a_base_is_for_experts_with_a_common_ancestor(ratio: float) -> None:
    related, with_base = (_low_rank("upcycled", f"ratio={ratio} base={base}") for base in ("none", "frequency"))
    assert (with_base < (0.75 if ratio > 0.5 else 0.5) * related).all()
    unrelated, with_base = (_low_rank("scratch", f"ratio={ratio} base={base}") for base in ("none", "frequency"))
    assert (unrelated < 0.9 * with_base).all()


@pytest.mark.parametrize("ratio", _RATIOS)
@pytest.mark.parametrize("name", _MODELS)
def test_differences_to_a_base_are_better_whitened(name: str, ratio: float) -> None:
    plain, gated = (
        _low_rank(name, f"ratio={ratio} base=frequency basis={basis}") for basis in ("plain", "gate-whitened")
    )
    assert (gated < 0.97 * plain).all()


@pytest.mark.parametrize("ratio", _RATIOS)
@pytest.mark.parametrize("name", _MODELS)
def test_a_latent_space_is_better_whitened(name: str, ratio: float) -> None:
    assert (_latent(name, ratio, "gate-whitened") < 0.9 * _latent(name, ratio, "plain")).all()


@pytest.mark.parametrize("name", _MODELS)
def test_some_neurons_whole_are_better_than_none_at_the_same_rank(name: str) -> None:
    assert (_low_rank(name, "rank=8 residual=0.1") < 0.95 * _low_rank(name, "rank=8")).all()


@pytest.mark.parametrize("name", _MODELS)
def test_modules_are_better_than_fewer_experts(name: str) -> None:
    """With the base that `auto` takes; the better of the two ways to run one expert alone differs by model."""
    alone = np.minimum(_auxiliary(name, "module=none base=skip"), _auxiliary(name, "module=none base=renorm"))
    constants, modules = _auxiliary(name, "module=constant"), _auxiliary(name, "rank=8")
    assert (modules < 0.75 * alone).all()
    assert (modules < 0.75 * constants).all()
    assert (modules < _auxiliary(name, "rank=2")).all()


@pytest.mark.parametrize("name", _MODELS)
def test_the_better_base_of_modules_is_found(name: str) -> None:
    skip, renorm = _auxiliary(name, "rank=8 base=skip").mean(), _auxiliary(name, "rank=8 base=renorm").mean()
    assert _auxiliary(name, "rank=8").mean() < 1.1 * min(skip, renorm)


@pytest.mark.parametrize("ratio", _RATIOS)
@pytest.mark.parametrize(
    "pipeline",
    ["low-rank{{ratio={}}}", "low-rank{{ratio={} base=frequency}}", "latent-factorize{{ratio={} sides=gate,up,down}}"],
)
def test_the_ratio_is_kept_in_bytes(pipeline: str, ratio: float) -> None:
    share = compress("scratch", pipeline.format(ratio)).expert_share
    assert ratio - 0.03 < share <= ratio
