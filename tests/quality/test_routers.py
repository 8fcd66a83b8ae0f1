"""Routers of a trained dense model's experts: fitted, trained, by representative neurons, by the token alone.

Held-out loss, nats per byte, of examples/models/tiny-dense in 8 experts by k-means; the calibration text is another
passage of the same works.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import moec
from moec.artifact.options import RAISING_PIPELINE
from moec.frontend.huggingface import load_huggingface
from moec.module import Module
from moec.weights.store import WeightStore
from tests.experts.models import copy_of
from tests.quality import harness
from tests.quality.dense_to_moe import CALIBRATION, HELDOUT, LENGTH, MODEL, SEEDS

WINDOWS = 32
K = 2

FITTED = "init-router"
CHANCE = "init-router{kind=random}"
NEURON = "init-router{kind=representative-neuron}"
TABLE = "init-router{kind=token-table}"
TRAINED = "init-router{kind=hidden-layer},train-router{labels=activation loss=bce epochs=15}"
NEAREST = "init-router{kind=random bias},train-router{labels=nearest loss=kl epochs=15 k=2}"
SUBSET = "init-router{kind=random bias},train-router{labels=best-subset loss=bce epochs=15 k=2}"


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Module, ...]:
    """The model in experts, one for each seed; of each, other windows are calibrated on."""
    store = WeightStore(tmp_path_factory.mktemp("store"))
    module = load_huggingface(MODEL, store)
    moec.run_passes(module, RAISING_PIPELINE)
    texts = ",".join(map(str, CALIBRATION))
    found = []
    for seed in SEEDS:
        copy = copy_of(module)
        moec.run_passes(copy, f"factorize{{experts=8}},calibrate{{text={texts} sequences=128}}", seed=seed)
        found.append(copy)
    return tuple(found)


@pytest.fixture(scope="module")
def losses(calibrated: tuple[Module, ...]) -> functools._lru_cache_wrapper[NDArray[np.float64]]:
    """Of a pipeline behind the calibration: the loss with `K` experts, one for each seed."""

    @functools.cache
    def measure(pipeline: str) -> NDArray[np.float64]:
        return np.asarray([loss(source, pipeline, seed) for seed, source in zip(SEEDS, calibrated, strict=True)])

    return measure


def loss(source: Module, pipeline: str, seed: int) -> float:
    module = copy_of(source)
    moec.run_passes(module, f"{pipeline},set-routing{{k={K} scale=calibrated}}", seed=seed)
    return float(np.mean([one_text(module, text) for text in HELDOUT]))


def one_text(module: Module, text: Path) -> float:
    return float(harness.loss(module, text, sequences=WINDOWS, length=LENGTH).mean())


@pytest.mark.slow
@pytest.mark.xdist_group("quality-routers")
class TestRouters:
    def test_all_of_them_are_better_than_chance(
        self, losses: functools._lru_cache_wrapper[NDArray[np.float64]]
    ) -> None:
        chance = losses(CHANCE)
        for pipeline in (FITTED, TABLE, TRAINED, SUBSET):
            found = losses(pipeline)
            print(f"{pipeline}: {found}; chance {chance}")
            assert (found + 0.05 < chance).all()

    def test_labels_of_factorllm_train_a_better_router_than_chance(
        self, losses: functools._lru_cache_wrapper[NDArray[np.float64]]
    ) -> None:
        found, chance = losses(NEAREST), losses(CHANCE)
        print(f"{NEAREST}: {found}; chance {chance}")
        assert (found < chance).all()

    def test_a_map_of_hidden_states_tells_more_than_one_neuron_of_each_expert(
        self, losses: functools._lru_cache_wrapper[NDArray[np.float64]]
    ) -> None:
        fitted, neuron = losses(FITTED), losses(NEURON)
        print(f"least squares {fitted}, representative neuron {neuron}, token table {losses(TABLE)}")
        assert (fitted < neuron).all()
