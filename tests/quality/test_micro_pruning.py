"""Which neurons and weights to drop: orderings of criteria on trained models, over seeds of the calibration."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from moec.api import run_passes
from tests.quality.harness import calibrated, increases, shown

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("quality-micro")]

_MODELS = ("scratch", "upcycled")
_RATIOS = (0.2, 0.4, 0.6, 0.8)
_HEAPR = ("heapr-sum", "heapr")
# nats per byte: what two calibration texts may differ in where little is lost
_TIE = 0.003


def _pruned(name: str, ratio: float, options: str) -> NDArray[np.float64]:
    return increases(name, f"prune-micro-experts{{ratio={ratio} {options}}}", gradients=True)


def _sparse(name: str, criterion: str) -> NDArray[np.float64]:
    return increases(name, f"nm-sparsify{{criterion={criterion}}}", gradients=True)


@pytest.mark.parametrize("ratio", _RATIOS)
@pytest.mark.parametrize("name", _MODELS)
def test_energy_is_far_better_than_magnitude_and_chance(name: str, ratio: float) -> None:
    factor = 4 if ratio < 0.5 else 2
    energy = _pruned(name, ratio, "criterion=camera")
    assert (factor * energy < _pruned(name, ratio, "criterion=magnitude")).all()
    assert (factor * energy < _pruned(name, ratio, "criterion=random")).all()


@pytest.mark.parametrize("ratio", _RATIOS)
@pytest.mark.parametrize("name", _MODELS)
def test_ranking_the_neurons_of_a_layer_is_better_than_equal_widths(name: str, ratio: float) -> None:
    ragged, equal = (_pruned(name, ratio, f"criterion=camera scope={scope}") for scope in ("layer", "expert"))
    assert (ragged < 0.95 * equal).all()


@pytest.mark.parametrize("ratio", _RATIOS)
@pytest.mark.parametrize("name", _MODELS)
def test_sensitivity_makes_energies_of_layers_comparable(name: str, ratio: float) -> None:
    """Where little is removed they are as good as without it, where much is they are better."""
    sensitive = _pruned(name, ratio, "criterion=energy-x-sensitivity scope=global").mean()
    plain = _pruned(name, ratio, "criterion=camera scope=global").mean()
    if ratio < 0.5:
        assert sensitive < plain + _TIE
    else:
        assert sensitive < 0.95 * plain
        assert sensitive < 0.95 * _pruned(name, ratio, "criterion=camera").mean()


@pytest.mark.parametrize("name", _MODELS)
def test_heapr_is_better_summed_over_tokens_than_averaged(name: str) -> None:
    """In the mean; the experts of these models are used nearly equally, so that single points are ties."""
    found = []
    for ratio in _RATIOS:
        for scope in ("layer", "global"):
            summed, averaged = (_pruned(name, ratio, f"criterion={item} scope={scope}") for item in _HEAPR)
            found.append(summed.mean() / averaged.mean())
    assert max(found) < 1.03
    assert np.exp(np.log(found).mean()) < 0.97


@pytest.mark.parametrize("ratio", _RATIOS)
@pytest.mark.parametrize("name", _MODELS)
def test_heapr_is_no_worse_than_energy_over_all_layers(name: str, ratio: float) -> None:
    heapr = shown(f"{name} {ratio:.0%} heapr", _pruned(name, ratio, "criterion=heapr-sum scope=global"))
    camera = shown(f"{name} {ratio:.0%} camera", _pruned(name, ratio, "criterion=camera scope=global"))
    assert heapr.mean() < camera.mean()


@pytest.mark.parametrize("name", _MODELS)
def test_second_order_is_far_better_than_scores_at_two_of_four(name: str) -> None:
    wanda, gate_wanda = _sparse(name, "wanda"), _sparse(name, "gate-wanda")
    assert (wanda < 0.95 * _sparse(name, "magnitude")).all()
    assert (gate_wanda < 1.05 * wanda).all()
    for criterion in ("sparsegpt", "gate-sparsegpt"):
        assert (_sparse(name, criterion) < 0.5 * gate_wanda).all()


def test_learned_masks_are_far_better_than_those_they_begin_with() -> None:
    """Behind second order, which changes the weights, too; these stay as they are."""
    learned = shown("scratch, learned 2:4", _sparse("scratch", "learned"))
    assert (learned < 0.6 * _sparse("scratch", "gate-wanda")).all()
    assert (_sparse("scratch", "gate-sparsegpt") < learned).all()


@pytest.mark.parametrize("name", _MODELS)
def test_a_fifth_of_the_smallest_weights_is_nearly_free(name: str) -> None:
    found = [
        float(increases(name, f"nm-sparsify{{pattern=global ratio={ratio}}}", seeds=(0,), gradients=True)[0])
        for ratio in _RATIOS
    ]
    assert found[0] < 0.02
    assert found == sorted(found)


@pytest.mark.parametrize("name", _MODELS)
def test_the_knee_lies_between_a_fifth_and_a_half(name: str) -> None:
    module = calibrated(name)
    report = run_passes(module, "find-knee")
    assert 20 <= report.records[0].statistics["knee"] <= 50
