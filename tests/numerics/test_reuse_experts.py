"""reuse-experts on tiny models: growing changes nothing, and layers that are alike share what they store."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moec
from moec.artifact.summary import model_size
from moec.dialects.builtin import WeightOp
from moec.experts import (
    FeedForward,
    MoeLayer,
    Projection,
    alias_experts,
    find_moe_layers,
    load_expert,
    protect_experts,
    replace_experts,
    slice_experts,
)
from moec.experts.expert import Dense
from moec.module import Module
from moec.pipeline.manager import PassManager, Pipeline, PipelineReport
from moec.pipeline.spec import PipelineError
from tests.experts.models import calibrate_text, copy_of, difference, output, raised_model

EXACT = 1e-12


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss", "deepseek_v3"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Module:
    return raised_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return raised_model("mixtral", tmp_path_factory.mktemp("mixtral"))


def layers_of(module: Module) -> tuple[MoeLayer, ...]:
    return find_moe_layers(module.op)


def reused(source: Module, options: str) -> tuple[Module, PipelineReport]:
    module = copy_of(source)
    pipeline = Pipeline.parse(f"reuse-experts{{{options}}},dce")
    return module, PassManager(pipeline).run(module.op, weights=module.weights, module=module)


def expert_sources(layer: MoeLayer) -> set[str]:
    return {stack.defining_op.source for stack in layer.experts.weights if isinstance(stack.defining_op, WeightOp)}


def tied(source: Module, folder: Path, changed: tuple[int, ...] = ()) -> Module:
    """The second layer's experts are the first's, but for those in `changed`; calibrated."""
    module = copy_of(source)
    first, second = layers_of(module)
    new = {number: load_expert(first, module.weights, number) for number in range(8) if number not in changed}
    # without where they came from, so that they are stored again
    replace_experts(second, module.weights, {number: replace(expert, loaded=()) for number, expert in new.items()})
    moec.run_passes(module, calibrate_text(folder, rows=16))
    return module


def test_growing_gives_each_layer_all_experts_and_the_same_outputs(source: Module) -> None:
    before = layers_of(source)
    module, report = reused(source, "direction=grow")
    if any(layer.route.routing.groups > 1 for layer in before):
        assert module.print() == source.print()
        assert "its router limits groups of experts" in report.explanation_text()
        return
    for old, new in zip(before, layers_of(module), strict=True):
        total = sum(layer.expert_count for layer in before)
        assert (new.outputs, new.expert_count) == (total, total)
        assert new.stored[: old.outputs] == old.stored
    first, second = layers_of(module)
    assert expert_sources(first) == expert_sources(second) == expert_sources(before[0]) | expert_sources(before[1])
    assert difference(output(source), output(module)) < EXACT
    assert report.records[0].statistics["added"] == sum(layer.expert_count for layer in before)


def test_growing_stores_only_the_new_rows_of_the_routers(mixtral: Module) -> None:
    module, _ = reused(mixtral, "direction=grow")
    hidden = layers_of(mixtral)[0].hidden_size
    assert model_size(module).parameters == model_size(mixtral).parameters + 2 * 8 * hidden


def test_growing_twice_adds_the_neighbours_of_neighbours_behind_masks(mixtral: Module) -> None:
    once, _ = reused(mixtral, "direction=grow")
    twice, _ = reused(once, "direction=grow")
    assert {layer.outputs for layer in layers_of(twice)} == {32}
    assert difference(output(mixtral), output(twice)) < EXACT


def test_tied_layers_are_stored_once_without_loss(mixtral: Module, tmp_path: Path) -> None:
    source = tied(mixtral, tmp_path)
    module, report = reused(source, "max-distortion=0")
    assert report.records[0].statistics["redirected"] == 8
    first, second = layers_of(module)
    assert expert_sources(first) == expert_sources(second)
    assert difference(output(source), output(module)) < EXACT
    saved = sum(math.prod(stack.type.static_shape) for stack in layers_of(source)[1].experts.weights)  # type: ignore[attr-defined]
    assert model_size(module).parameters == model_size(source).parameters - saved


def test_only_what_is_alike_is_shared(mixtral: Module, tmp_path: Path) -> None:
    source = tied(mixtral, tmp_path, changed=(2, 5))
    module, report = reused(source, "max-distortion=1e-6")
    assert report.records[0].statistics["redirected"] == 6
    first, second = layers_of(module)
    assert len(expert_sources(first) & expert_sources(second)) == len(expert_sources(first)) // 2
    assert (first.expert_count, second.expert_count) == (8, 8)
    assert difference(output(source), output(module)) < EXACT
    assert "6 of 8 experts are those of other layers" in report.explanation_text()


def test_protected_experts_stay_and_are_protected_where_they_are_used(mixtral: Module, tmp_path: Path) -> None:
    source = tied(mixtral, tmp_path)
    first, second = layers_of(source)
    protect_experts(first, [1])
    protect_experts(second, [4])
    module, report = reused(source, "max-distortion=0")
    assert report.records[0].statistics["redirected"] == 8
    first, second = layers_of(module)

    def weights_of(layer: MoeLayer, output: int) -> torch.Tensor:
        expert = load_expert(layer, module.weights, layer.stored[output])
        assert isinstance(expert, FeedForward)
        return expert.up.dense()

    # the first layer's expert 4 is replaced by the second's, which must stay
    for layer in (first, second):
        assert layer.protected == {layer.stored[1], layer.stored[4]}
    assert torch.equal(weights_of(first, 4), weights_of(second, 4))
    assert difference(output(source), output(module)) < EXACT


def test_a_distortion_that_is_allowed_is_what_changes(mixtral: Module, tmp_path: Path) -> None:
    source = tied(mixtral, tmp_path)
    layer = layers_of(source)[1]
    expert = load_expert(layer, source.weights, 3)
    assert isinstance(expert, FeedForward)
    scaled = replace(expert, down=Projection(Dense(expert.down.dense() * 1.1)))
    replace_experts(layer, source.weights, {3: scaled})
    share = (0.1 / 1.1) ** 2
    _, below = reused(source, f"max-distortion={share * 0.99}")
    _, above = reused(source, f"max-distortion={share * 1.01}")
    assert (below.records[0].statistics["redirected"], above.records[0].statistics["redirected"]) == (7, 8)


def test_experts_without_tokens_and_outputs_without_experts_stay(mixtral: Module, tmp_path: Path) -> None:
    source = tied(mixtral, tmp_path)
    layer = layers_of(source)[1]
    alias_experts(layer, [-1, *range(1, 8)])
    moec.run_passes(source, calibrate_text(tmp_path, rows=1, length=2))
    assert source.calibration is not None
    unrouted = sum(int((source.calibration.statistics(layer).count == 0).sum()) for layer in layers_of(source))
    module, report = reused(source, "max-distortion=0")
    assert report.records[0].statistics["unrouted"] == unrouted > 0
    assert layers_of(module)[1].stored[0] == -1
    assert difference(output(source), output(module)) < EXACT


def test_layers_with_different_numbers_of_experts_grow(mixtral: Module) -> None:
    module = copy_of(mixtral)
    slice_experts(layers_of(module)[0], range(4))
    result, _ = reused(module, "direction=grow group=3")
    assert {layer.outputs for layer in layers_of(result)} == {12}
    assert difference(output(module), output(result)) < EXACT


@pytest.mark.parametrize(
    ("options", "message"), [("group=1", "group must be at least 2"), ("max-distortion=-1", "is negative")]
)
def test_options_that_cannot_be(mixtral: Module, options: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        reused(mixtral, options)
