"""Recipes that make experts of dense models: what each of them promises of structure and at the start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import moec
from moec.dialects.builtin import WeightOp
from moec.experts import FeedForward, MoeLayer, find_dense_layers, find_moe_layers, load_dense, load_expert, run_layer
from moec.experts.router_source import is_frozen, router_weights
from moec.frontend.model_kind import ModelKind
from moec.ir import Operation, TensorType
from moec.module import Module
from moec.pipeline.recipes import find_recipe
from moec.reference.executor import Executor
from tests.experts.models import copy_of, difference, output, raised_model
from tests.frontend.tiny_models import VOCABULARY_SIZE

EXACT = 1e-9
SMALL = {"sequences": "96", "length": "32"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return raised_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return raised_model("mixtral", tmp_path_factory.mktemp("mixtral"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, VOCABULARY_SIZE, (96, 32)))
    return path


def made(source: Module, tokens: Path, name: str, seed: int = 0, **settings: object) -> Module:
    """The model behind a recipe with some of its parameters."""
    module = copy_of(source)
    recipe = find_recipe(name, ModelKind.MOE if find_moe_layers(source.op) else ModelKind.DENSE)
    given = {key: value for key, value in SMALL.items() if key in recipe.parameters}
    text = recipe.text(settings=given | {key: str(value) for key, value in settings.items()})
    moec.run_passes(module, text, seed=seed, calibration=tokens)
    return module


def every_expert(source: Module) -> Module:
    module = copy_of(source)
    moec.run_passes(module, "set-routing{select=all combine=one scale=constant}")
    return module


def size_of(module: Module) -> int:
    """Numbers in all weights that are read."""
    kinds = [op.value.type for op in module.op.walk() if isinstance(op, WeightOp)]
    return sum(int(np.prod(kind.static_shape)) for kind in kinds if isinstance(kind, TensorType))


def router_size(module: Module) -> int:
    weights: dict[Operation, None] = {}
    for layer in find_moe_layers(module.op):
        weights |= dict.fromkeys(router_weights(layer))
    kinds = [op.results[0].type for op in weights]
    return sum(int(np.prod(kind.static_shape)) for kind in kinds if isinstance(kind, TensorType))


def error(module: Module) -> float:
    """Of the layers' outputs on the calibration's rows, relative to them."""
    assert module.calibration is not None
    total = energy = 0.0
    for layer in find_moe_layers(module.op):
        sample = module.calibration.sample(layer)
        y = run_layer(layer, module.weights, sample.x, sample.router_input).y
        assert y is not None
        total += float((y - sample.y).square().sum())
        energy += float(sample.y.square().sum())
    return total / energy


def widths(layer: MoeLayer, module: Module) -> list[int]:
    experts = [load_expert(layer, module.weights, number) for number in range(layer.expert_count)]
    return [expert.width for expert in experts if isinstance(expert, FeedForward)]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("best", {"experts": 6, "k": 3}),
        ("factorllm", {"epochs": 2}),
        ("moefication", {"experts": 8, "epochs": 2}),
        ("llama-moe", {"experts": 8}),
        ("cmoe", {"experts": 6, "active": 4}),
        ("union-of-experts", {}),
        ("smoe-dropout", {"experts": 8, "k": 4}),
    ],
)
def test_with_all_experts_the_model_is_the_dense_one(
    dense: Module, tokens: Path, name: str, settings: dict[str, object]
) -> None:
    module = made(dense, tokens, name, **settings)
    layers = find_moe_layers(module.op)
    assert layers and all(layer.top_k < layer.outputs for layer in layers if layer.outputs > 2)
    assert difference(output(dense), output(every_expert(module))) < EXACT
    # nothing but routers is added
    assert size_of(module) - router_size(module) == size_of(dense)


def test_equal_seeds_give_equal_models(dense: Module, tokens: Path) -> None:
    one, other = (made(dense, tokens, "factorllm", epochs=1) for _ in range(2))
    assert one.print() == other.print() != made(dense, tokens, "factorllm", 1, epochs=1).print()


def test_a_scale_is_one_where_all_experts_run(dense: Module, tokens: Path) -> None:
    for name in ("best", "llama-moe"):
        module = made(dense, tokens, name, experts=4, k=4)
        assert all(abs(layer.route.routing.scale - 1) < 1e-6 for layer in find_moe_layers(module.op))


@pytest.mark.slow
def test_moefication_ranks_better_than_chance(dense: Module, tokens: Path) -> None:
    for seed in range(3):
        module = made(dense, tokens, "moefication", seed, experts=8, k=2, epochs=8)
        assert all(set(widths(layer, module)) == {12} for layer in find_moe_layers(module.op))
        chance = copy_of(module)
        moec.run_passes(chance, "init-router{kind=random}", seed=seed)
        assert error(module) < error(chance)


def test_cmoe_keeps_as_many_neurons_for_all_as_two_experts_have(dense: Module, tokens: Path) -> None:
    module = made(dense, tokens, "cmoe", experts=6, active=4)
    for layer, block in zip(find_moe_layers(module.op), find_dense_layers(module.op), strict=True):
        assert block.is_beside_experts
        assert load_dense(block, module.weights).width == 24 and widths(layer, module) == [12] * 6


def test_read_me_looks_experts_up_by_the_token(dense: Module, tokens: Path) -> None:
    module = made(dense, tokens, "read-me", experts=3)
    layers = find_moe_layers(module.op)
    assert {layer.top_k for layer in layers} == {1} and len({layer.route.logits for layer in layers}) == 1
    blocks = {block.name: load_dense(block, module.weights).width for block in find_dense_layers(module.op)}
    for layer in layers:
        common = sum(width for name, width in blocks.items() if name.startswith(layer.name))
        assert [width + common for width in widths(layer, module)] == [48] * 3
    assert module.calibration is not None
    sample = module.calibration.sample(layers[0])
    ids = module.calibration.token_ids(sample)
    run = run_layer(layers[0], module.weights, sample.x, sample.router_input, with_experts=False)
    for token in ids.unique()[:10]:
        assert len(run.ids[ids == token].unique()) == 1
    # other sequences beside it change nothing
    batch = torch.randint(0, VOCABULARY_SIZE, (3, 6), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": batch, "attention_mask": torch.ones_like(batch)}
    given["position_ids"] = torch.arange(6).expand(3, 6).clone()
    inputs = {name: given[name] for name in module.main.arg_names}
    executor = Executor(module.op, module.weights, dtype=torch.float64)
    with torch.no_grad():
        together = executor.run(inputs)["logits"]
        alone = executor.run({name: value[1:2] for name, value in inputs.items()})["logits"]
    assert difference(alone, together[1:2]) < EXACT


def test_smoe_dropout_runs_with_any_number_of_experts(dense: Module, tokens: Path) -> None:
    module = made(dense, tokens, "smoe-dropout", experts=8, k=4)
    assert all(is_frozen(layer) for layer in find_moe_layers(module.op))
    sources = [weight.source for layer in find_moe_layers(module.op) for weight in router_weights(layer)]
    for k in (1, 3, 8):
        other = copy_of(module)
        moec.run_passes(other, f"set-routing{{k={k}}}")
        assert [weight.source for layer in find_moe_layers(other.op) for weight in router_weights(layer)] == sources
        assert difference(output(dense), output(other)) < EXACT or k < 8


def test_deepseek_segments_are_the_experts_that_there_were(mixture: Module, tokens: Path) -> None:
    module = made(mixture, tokens, "deepseek-segment", parts=3)
    assert difference(output(mixture), output(module)) < EXACT
    before, after = find_moe_layers(mixture.op)[0], find_moe_layers(module.op)[0]
    assert after.outputs == 3 * before.outputs and after.top_k == 3 * before.top_k
    assert size_of(module) - router_size(module) == size_of(mixture) - router_size(mixture)
