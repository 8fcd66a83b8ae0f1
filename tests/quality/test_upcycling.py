"""What upcycling costs a small trained dense model before any training: nothing for copies, more with new neurons.

The numbers of the design page are from another model; orderings and margins here are those that hold for both.
"""

from __future__ import annotations

import pytest

import moec
from moec.artifact.evaluation import source_scorer
from moec.artifact.loss import LossSettings, measure_loss
from moec.artifact.options import RAISING_PIPELINE
from moec.artifact.text import TextCodec
from moec.dialects.builtin import ModuleOp
from moec.frontend.huggingface import load_huggingface
from moec.frontend.model_kind import ModelKind
from moec.module import Module
from moec.pipeline.recipes import find_recipe
from moec.weights.store import WeightStore
from tests.quality.fine_tunes import SEED_MODEL

pytestmark = pytest.mark.slow

TEXT = SEED_MODEL.parents[1] / "data" / "kjv.heldout.txt"
TOKENS = 2048
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Module:
    module = load_huggingface(SEED_MODEL, WeightStore(tmp_path_factory.mktemp("store")))
    moec.run_passes(module, RAISING_PIPELINE)
    return module


def loss(module: Module) -> float:
    """Nats per token of held-out text."""
    settings = LossSettings(window=256, limit=TOKENS)
    return measure_loss(TextCodec(SEED_MODEL).read(TEXT), "", source_scorer(module), settings).nats_per_token


def changed(source: Module, pipeline: str, seed: int = 0) -> float:
    clone = source.op.clone()
    assert isinstance(clone, ModuleOp)
    module = Module(clone, source.weights, source.source)
    moec.run_passes(module, pipeline, seed=seed)
    return loss(module)


def recipe(text: str) -> str:
    name, _, rest = text.partition("{")
    settings = dict(item.split("=") for item in rest.rstrip("}").split())
    return find_recipe(name, ModelKind.DENSE).text(settings=settings)


@pytest.mark.parametrize("name", ["sparse-upcycling", "virtual-groups", "dynamic-dino", "mote{scale=0}"])
def test_copies_cost_nothing(dense: Module, name: str) -> None:
    assert abs(changed(dense, recipe(name)) - loss(dense)) < 1e-4


def test_a_little_of_a_ternary_copy_costs_little(dense: Module) -> None:
    assert abs(changed(dense, recipe("mote{scale=0.1}")) - loss(dense)) <= 0.01


def test_neurons_that_are_drawn_anew_cost_more_the_more_there_are(dense: Module) -> None:
    before = loss(dense)
    for seed in SEEDS:
        losses = [changed(dense, recipe(f"drop-upcycling{{ratio={ratio}}}"), seed) for ratio in (0.1, 0.5, 1.0)]
        assert before < losses[0] < losses[1] < losses[2]
        apart = changed(dense, "upcycle{perturb=drop ratio=0.5 aligned=false}", seed)
        assert losses[1] + 0.1 < apart


def test_noise_costs_less_than_new_neurons(dense: Module) -> None:
    for seed in SEEDS:
        noisy = changed(dense, "upcycle{perturb=noise ratio=0.5 noise=0.02}", seed)
        assert abs(noisy - loss(dense)) < changed(dense, recipe("drop-upcycling"), seed) - loss(dense)


def test_switch_gates_break_copies(dense: Module) -> None:
    assert changed(dense, "upcycle{gates=score k=1}") > loss(dense) + 0.1
