"""Factored matrices and light modules: orderings on trained models, over seeds of the calibration."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.quality.harness import compress, increases

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("quality-factor")]

MODELS = ("scratch", "upcycled")
KEPT = (0.75, 0.5, 0.25)


def factored(name: str, keep: float, options: str = "") -> NDArray[np.float64]:
    return increases(name, f"low-rank{{ratio={keep:g} {options}}}", gradients=True)


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("name", MODELS)
def test_the_nearer_the_norm_is_to_the_output_the_better(name: str, keep: float) -> None:
    plain, whitened, gated = (
        factored(name, keep, f"basis={basis}") for basis in ("plain", "whitened", "gate-whitened")
    )
    assert (whitened < 0.8 * plain).all()
    assert (gated < 0.98 * whitened).all()


@pytest.mark.parametrize("keep", KEPT)
def test_a_shared_base_helps_experts_of_one_ancestor_alone(keep: float) -> None:
    share = 0.75 if keep > 0.5 else 0.5
    assert (factored("upcycled", keep, "base=frequency") < share * factored("upcycled", keep)).all()
    assert (factored("scratch", keep, "base=frequency") > 1.1 * factored("scratch", keep)).all()


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("name", MODELS)
def test_differences_to_a_base_are_better_whitened(name: str, keep: float) -> None:
    plain, gated = (factored(name, keep, f"base=frequency basis={basis}") for basis in ("plain", "gate-whitened"))
    assert (gated < 0.97 * plain).all()


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("name", MODELS)
def test_a_shared_projection_is_better_whitened(name: str, keep: float) -> None:
    plain, whitened = (
        increases(name, f"latent-factorize{{ratio={keep:g} sides=gate,up,down basis={basis}}}", gradients=True)
        for basis in ("plain", "whitened")
    )
    assert (whitened < 0.95 * plain).all()


@pytest.mark.parametrize("name", MODELS)
def test_some_neurons_whole_are_better_than_none_at_the_same_rank(name: str) -> None:
    none, some = (increases(name, f"low-rank{{rank=8 residual={share}}}", gradients=True) for share in (0, 0.1))
    assert (some < 0.95 * none).all()


@pytest.mark.parametrize("keep", [0.5, 0.25])
def test_a_shared_projection_is_cheaper_for_experts_of_one_ancestor(keep: float) -> None:
    def price(name: str) -> NDArray[np.float64]:
        latent = increases(name, f"latent-factorize{{ratio={keep:g} sides=gate,up,down}}", gradients=True)
        return latent / factored(name, keep)

    assert (price("upcycled") < price("scratch")).all()


@pytest.mark.parametrize("name", MODELS)
def test_affine_modules_are_better_than_constants_and_than_nothing(name: str) -> None:
    def auxiliary(options: str) -> NDArray[np.float64]:
        return increases(name, f"replace-auxiliary{{main=1 {options}}}", gradients=True)

    without = np.minimum(auxiliary("module=none base=skip"), auxiliary("module=none base=renorm"))
    affine = np.minimum(auxiliary("rank=8 base=skip"), auxiliary("rank=8 base=renorm"))
    assert (affine < 0.75 * without).all()
    assert (affine < auxiliary("module=constant")).all()
    # the better base is found layer by layer, on the calibration text
    assert (auxiliary("rank=8 base=auto") < 1.1 * affine).all()


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize(
    "options", ["low-rank{{{}}}", "low-rank{{{} base=frequency}}", "latent-factorize{{{} sides=gate,up,down}}"]
)
def test_the_ratio_is_kept_in_bytes(options: str, keep: float) -> None:
    share = compress("scratch", options.format(f"ratio={keep:g}"), gradients=True).expert_share
    assert keep - 0.03 < share <= keep
