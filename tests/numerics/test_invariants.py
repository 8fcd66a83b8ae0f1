"""What every way to make a layer smaller must leave in order, whatever it does: on one model, for all passes.

Tests of one pass alone name the invariant that they are about as V1 to V16 in their first line. V12 (bytes and FLOPs
of plans) is in test_solve_budget, V13 (predicted losses) in tests/quality/test_budget.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

import moec
from moec.dialects.builtin import WeightOp
from moec.experts import FeedForward, MoeLayer, find_moe_layers, load_expert, protect_experts, run_layer
from moec.ir import structural_difference
from moec.module import Module
from tests.experts.models import calibrate_text, copy_of, raised_model

Smaller = Callable[[str], Module]

PROTECTED = (1, 6)
SMALLER = (
    "prune-experts{keep=5}",
    "prune-experts{keep=5 on-drop=zero}",
    pytest.param("prune-experts{keep=5 on-drop=constant}", marks=pytest.mark.slow),
    "prune-experts{keep=5 on-drop=redirect}",
    "merge-experts{keep=5}",
    pytest.param("merge-experts{keep=5 router=keep-row}", marks=pytest.mark.slow),
    pytest.param("merge-experts{keep=5 router=log-sum-exp}", marks=pytest.mark.slow),
    "merge-experts{keep=5 grouping=facility keep-dominant}",
    "recombine-neurons{keep=5 tau=0.1}",
    "prune-micro-experts{ratio=0.4}",
    pytest.param("low-rank{ratio=0.5}", marks=pytest.mark.slow),
    "low-rank{ratio=0.5 base=frequency}",
    pytest.param("latent-factorize{ratio=0.5}", marks=pytest.mark.slow),
    pytest.param("nm-sparsify{criterion=wanda}", marks=pytest.mark.slow),
    pytest.param("solve-budget{bytes=40%},apply-plan", marks=pytest.mark.slow),
    "solve-budget{bytes=40% refit},apply-plan,refit-down{least-tokens=1}",
)
NOTHING = (
    "prune-experts{keep=8}",
    "merge-experts{keep=8}",
    "merge-experts{keep=8 grouping=facility}",
    "recombine-neurons{keep=8}",
    "prune-micro-experts{ratio=0}",
    "low-rank{rank=64}",
    "latent-factorize{rank=64}",
    "group-route{groups=1}",
    "solve-budget{bytes=100%},apply-plan",
    "refit-down{least-tokens=1}",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Module:
    """8 experts, of which a token chooses 2 whose gates add up to one; two are protected in each layer."""
    folder = tmp_path_factory.mktemp("model")
    module = raised_model("mixtral", folder)
    moec.run_passes(module, calibrate_text(folder))
    for layer in find_moe_layers(module.op):
        protect_experts(layer, PROTECTED)
    return module


@pytest.fixture(scope="module")
def smaller(source: Module) -> Smaller:
    """The model after a pipeline, which runs once for all tests."""

    @cache
    def run(pipeline: str) -> Module:
        module = copy_of(source)
        moec.run_passes(module, f"{pipeline},dce")
        return module

    return run


def layers_of(module: Module) -> list[MoeLayer]:
    return find_moe_layers(module.op)


@pytest.mark.parametrize("pipeline", NOTHING)
def test_v1_nothing_to_do_changes_no_bit(source: Module, pipeline: str) -> None:
    module = copy_of(source)
    moec.run_passes(module, pipeline)
    assert structural_difference(source.op, module.op) is None


@pytest.mark.parametrize("pipeline", SMALLER)
def test_v2_tokens_still_choose_as_many_with_gates_of_the_same_sum(
    source: Module, smaller: Smaller, pipeline: str
) -> None:
    """Gates of outputs that name no expert any more are lost, as `on-drop=zero` says."""
    module = smaller(pipeline)
    assert source.calibration is not None
    for before, layer in zip(layers_of(source), layers_of(module), strict=True):
        sample = source.calibration.sample(before)
        run = run_layer(layer, module.weights, sample.x, sample.router_input, with_experts=False)
        assert layer.top_k == before.top_k <= layer.outputs
        assert run.gates.shape == (len(sample), layer.top_k)
        torch.testing.assert_close(run.gates.sum(1), torch.ones(len(sample)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("pipeline", SMALLER)
def test_v3_routers_and_experts_agree_and_no_weight_is_left_over(smaller: Smaller, pipeline: str) -> None:
    module = smaller(pipeline)
    for layer in layers_of(module):
        assert layer.outputs == len(layer.stored) == len(layer.experts.stored)
        assert sum(len(group.experts) for group in layer.experts.classes) == layer.expert_count
    assert all(op.value.uses for op in module.op.walk() if isinstance(op, WeightOp))


@pytest.mark.parametrize("pipeline", SMALLER)
def test_v4_every_router_output_has_a_slot_and_every_expert_is_named(smaller: Smaller, pipeline: str) -> None:
    """The table from outputs to stored experts is total and onto; -1 is the expert that gives nothing."""
    for layer in layers_of(smaller(pipeline)):
        assert len(layer.stored) == layer.outputs
        assert set(layer.stored) - {-1} == set(range(layer.expert_count))


@pytest.mark.parametrize("pipeline", SMALLER)
def test_v11_protected_experts_keep_every_bit(source: Module, smaller: Smaller, pipeline: str) -> None:
    module = smaller(pipeline)
    for before, layer in zip(layers_of(source), layers_of(module), strict=True):
        for old, new in zip(PROTECTED, sorted(layer.protected), strict=True):
            pairs = zip(_matrices(source, before, old), _matrices(module, layer, new), strict=True)
            assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("pipeline", [text for text in SMALLER if isinstance(text, str) and "keep=" in text])
def test_v16_the_same_again_changes_nothing(smaller: Smaller, pipeline: str) -> None:
    once = smaller(pipeline)
    twice = copy_of(once)
    moec.run_passes(twice, f"{pipeline},dce")
    assert structural_difference(once.op, twice.op) is None


def _matrices(module: Module, layer: MoeLayer, number: int) -> list[torch.Tensor]:
    expert = load_expert(layer, module.weights, number)
    assert isinstance(expert, FeedForward) and expert.gate is not None
    return [side.dense() for side in (expert.gate, expert.up, expert.down)]
