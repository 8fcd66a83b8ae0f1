"""replace-auxiliary on tiny models: what runs in full, what in its place, and that it really is less."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moec
from moec.artifact.summary import model_size
from moec.dialects.moe import ExpertsOp, RouteOp
from moec.errors import UsageError
from moec.experts import (
    Affine,
    Constant,
    Expert,
    FeedForward,
    find_moe_layers,
    load_expert,
    protect_experts,
    replace_experts,
    run_layer,
)
from moec.module import Module
from moec.passes.auxiliary_experts.fitting import AuxiliaryRows, Base, ModuleForm, ModuleKind
from moec.passes.auxiliary_experts.rewriting import narrowed
from moec.passes.factoring.sides import parameters
from moec.pipeline.manager import PassRecord
from tests.experts.models import calibrate_text, copy_of, difference, output, raised_model

# gates normalised over the chosen; of all experts and not normalised; sigmoid with a bias, groups and a scale
MODELS = {"mixtral": {"num_experts_per_tok": 3}, "qwen2_moe": {"num_experts_per_tok": 3}, "deepseek_v3": {}}


@pytest.fixture(scope="module", params=MODELS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Module:
    return calibrated(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return calibrated("mixtral", tmp_path_factory)


def calibrated(model_type: str, factory: pytest.TempPathFactory) -> Module:
    folder = factory.mktemp(model_type)
    module = raised_model(model_type, folder, **MODELS[model_type])
    moec.run_passes(module, calibrate_text(folder, rows=16))
    return module


def run(source: Module, options: str) -> tuple[Module, PassRecord]:
    module = copy_of(source)
    record = moec.run_passes(module, f"replace-auxiliary{{{options}}},dce").records[0]
    return module, record


def experts_ops(module: Module) -> list[ExpertsOp]:
    return [op for op in module.op.walk() if isinstance(op, ExpertsOp)]


def auxiliary_ops(module: Module) -> list[ExpertsOp]:
    return [op for op in experts_ops(module) if op.location.name.endswith(".auxiliary")]


def change(source: Module, new: Callable[[int, FeedForward], Expert]) -> Module:
    """All layers with other experts."""
    module = copy_of(source)
    for layer in find_moe_layers(module.op):
        changed = {}
        for number in range(layer.expert_count):
            expert = load_expert(layer, module.weights, number)
            assert isinstance(expert, FeedForward)
            changed[number] = new(number, expert)
        replace_experts(layer, module.weights, changed)
    return module


def affine(seed: int, hidden_size: int) -> Affine:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((hidden_size, 2), (2, hidden_size), (hidden_size,))
    return Affine(*(torch.randn(*size, generator=generator) / hidden_size**0.5 for size in sizes))


# Of these models a routing of fewer experts says what is left: all gates scaled, or all as they are.
FEWER = [
    ("mixtral", "renorm", {"num_experts_per_tok": 1}),
    ("mixtral", "renorm", {"num_experts_per_tok": 2}),
    ("qwen2_moe", "skip", {"num_experts_per_tok": 1}),
    ("deepseek_v3", "renorm", {"num_experts_per_tok": 1}),
]


@pytest.mark.parametrize(("model_type", "base", "config"), FEWER)
def test_without_modules_the_model_is_one_of_fewer_experts(
    model_type: str, base: str, config: dict[str, int], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = calibrated(model_type, tmp_path_factory)
    main = config["num_experts_per_tok"]
    changed, record = run(source, f"main={main} module=none base={base}")
    # the same weights, as tiny checkpoints are made from one seed
    fewer = raised_model(model_type, tmp_path, **MODELS[model_type] | config)
    assert difference(output(fewer), output(changed)) < 1e-9
    assert record.statistics["replaced"] == 0 and not auxiliary_ops(changed)
    # the main experts are a layer like any other, with the route of fewer
    assert [layer.top_k for layer in find_moe_layers(changed.op)] == [main] * len(experts_ops(changed))
    assert model_size(changed).active_flops == model_size(fewer).active_flops


def test_scaled_gates_by_arithmetic_are_those_of_a_routing(source: Module) -> None:
    """Where no routing of fewer experts gives the gates: the sum over the main slots, scaled or not, by hand."""
    layer = find_moe_layers(source.op)[0]
    for main in range(1, layer.top_k):
        for base in Base:
            narrow = narrowed(layer.route, main, base)
            changed, _ = run(source, f"main={main} module=none base={base.value}")
            first = experts_ops(changed)[0]
            is_route = isinstance(first.gates.defining_op, RouteOp)
            assert is_route == (narrow is not None)
    bases = {base: narrowed(layer.route, 1, base) is not None for base in Base}
    assert sorted(bases.values()) == [False, True]


def constant(seed: int, hidden_size: int) -> Constant:
    return Constant(torch.randn(hidden_size, generator=torch.Generator().manual_seed(seed)))


def test_experts_that_are_constants_already_lose_nothing(source: Module) -> None:
    """Ranks, ids and gates go where they belong."""
    size, top_k = (find_moe_layers(source.op)[0].hidden_size, find_moe_layers(source.op)[0].top_k)
    changed = change(source, lambda number, _: constant(number, size))
    for main in range(1, top_k):
        result, record = run(changed, f"main={main} module=constant base=skip coverage=1")
        assert difference(output(changed), output(result)) < 1e-5
        none, _ = run(changed, f"main={main} module=none base=skip")
        assert difference(output(changed), output(none)) > 0.02
        assert "the output's squared error on the calibration text is 0.00% with base=skip" in record.remarks[0].text


def test_experts_that_are_modules_already_are_found(mixtral: Module) -> None:
    size = find_moe_layers(mixtral.op)[0].hidden_size
    changed = change(mixtral, lambda number, _: affine(number, size))
    result, _ = run(changed, "main=1 rank=2 base=skip")
    assert difference(output(changed), output(result)) < 2e-3
    less, _ = run(changed, "main=1 rank=1 base=skip")
    assert difference(output(changed), output(less)) > 0.02


def test_equal_experts_need_only_the_best(mixtral: Module) -> None:
    """What all experts give is what scaled gates give, and the modules have nothing to add."""
    first = load_expert(find_moe_layers(mixtral.op)[0], mixtral.weights, 0)
    equal = change(mixtral, lambda _, __: first)
    result, record = run(equal, "main=1 rank=2 base=auto")
    assert difference(output(equal), output(result)) < 1e-4
    assert all("base=renorm;" in remark.text for remark in record.remarks)


def test_the_better_base_is_taken_in_each_layer(source: Module) -> None:
    found = [run(source, f"main=1 rank=2 base={base}")[1].remarks for base in ("skip", "renorm", "auto")]
    layers = [[remark for remark in remarks if "run in full" in remark.text] for remarks in found]
    for skip, renorm, auto in zip(*layers, strict=True):
        errors = {
            base: float(re.findall(rf"([\d.]+)% with base={base}", remark.text)[0])
            for base, remark in (("skip", skip), ("renorm", renorm))
        }
        assert f"base={min(errors, key=errors.__getitem__)};" in auto.text


@pytest.mark.parametrize("base", list(Base))
@pytest.mark.parametrize("kind", [ModuleKind.CONSTANT, ModuleKind.AFFINE])
def test_the_error_that_is_said_is_that_of_the_layer(source: Module, base: Base, kind: ModuleKind) -> None:
    layer = find_moe_layers(source.op)[0]
    assert source.calibration is not None
    sample = source.calibration.sample(layer)
    slots = AuxiliaryRows(layer, sample, source.weights, 1)
    fitted = slots.fit(base, ModuleForm(kind, 3, 4))
    run = run_layer(layer, source.weights, sample.x, sample.router_input, torch.float64)
    assert run.y is not None
    gates = run.gates.clone()
    if base is Base.RENORM:
        gates[:, :1] *= gates.sum(1, keepdim=True) / gates[:, :1]
    x = sample.x.double()
    found = torch.zeros_like(x)
    for number in range(layer.expert_count):
        main, rest = (
            torch.where(run.stored_ids[:, part] == number, gates[:, part], 0.0).sum(1, keepdim=True)
            for part in (slice(0, 1), slice(1, None))
        )
        expert = load_expert(layer, source.weights, number, torch.float64)
        found += main * expert.apply(x) + rest * fitted.modules[number].apply(sample.x).double()
    assert fitted.error == pytest.approx(float((found - run.y).square().sum()), rel=1e-3)
    assert slots.energy() == pytest.approx(float(run.y.square().sum()), rel=1e-3)


def test_modules_fit_better_than_constants_and_these_better_than_nothing(source: Module) -> None:
    layer = find_moe_layers(source.op)[0]
    assert source.calibration is not None
    slots = AuxiliaryRows(layer, source.calibration.sample(layer), source.weights, 1)
    for base in Base:
        forms = [ModuleForm(ModuleKind.NONE, 1, 4), ModuleForm(ModuleKind.CONSTANT, 1, 4)]
        errors = [slots.fit(base, form).error for form in (*forms, ModuleForm(ModuleKind.AFFINE, 8, 4))]
        assert errors[0] > errors[1] > errors[2]


def test_a_token_multiplies_with_less(source: Module) -> None:
    layer = find_moe_layers(source.op)[0]
    changed, record = run(source, "main=1 rank=2")
    before, after = model_size(source), model_size(changed)
    assert after.active_flops < before.active_flops
    counted = record.statistics
    dense = load_expert(layer, source.weights, 0)
    assert isinstance(dense, FeedForward)
    one = parameters(dense)
    layers = len(experts_ops(source))
    assert counted["before"] == layers * layer.top_k * one
    module_size = 2 * 2 * layer.hidden_size
    assert counted["after"] == layers * (one + (layer.top_k - 1) * module_size)
    # all that is multiplied less are the experts'
    saved = layers * (layer.top_k - 1) * (one - module_size)
    assert before.active_flops - after.active_flops == 2 * saved
    # stored are the experts as before and the modules
    modules = layers * layer.expert_count * (module_size + layer.hidden_size)
    assert after.parameters == before.parameters + modules


def test_few_tokens_share_a_module(mixtral: Module) -> None:
    changed, record = run(mixtral, "main=1 rank=2 coverage=100000")
    assert record.statistics["pooled"] == sum(layer.expert_count for layer in find_moe_layers(mixtral.op))
    # too few in all: fits of their own after all, and zero for an expert without a token
    assert output(changed).isfinite().all()
    layer = find_moe_layers(mixtral.op)[0]
    assert mixtral.calibration is not None
    slots = AuxiliaryRows(layer, mixtral.calibration.sample(layer), mixtral.weights, 1)
    counts = sorted(len(slots.auxiliary(number)[0]) for number in range(layer.expert_count))
    coverage = counts[1] + 1
    shared = slots.fit(Base.SKIP, ModuleForm(ModuleKind.AFFINE, 2, coverage))
    starved = slots.starved(ModuleForm(ModuleKind.AFFINE, 2, coverage))
    assert len(starved) >= 2
    modules = [shared.modules[number] for number in starved]
    assert all(module is modules[0] for module in modules)


@pytest.mark.parametrize("kind", ["affine", "constant", "none"])
def test_protected_experts_run_at_every_rank(source: Module, kind: str) -> None:
    module = copy_of(source)
    for layer in find_moe_layers(module.op):
        protect_experts(layer, range(layer.expert_count))
    result, record = run(module, f"main=1 module={kind}")
    assert record.statistics["replaced"] == 0
    assert difference(output(source), output(result)) < 1e-12
    refused, record = run(module, f"main=1 module={kind} base=renorm")
    assert len(record.refusals) == len(experts_ops(source))
    assert torch.equal(output(source), output(refused))


def test_one_protected_expert_keeps_its_weights(mixtral: Module) -> None:
    module = copy_of(mixtral)
    layer = find_moe_layers(module.op)[0]
    protect_experts(layer, (2,))
    result, record = run(module, "main=1 rank=2")
    auxiliary = auxiliary_ops(result)[0]
    kinds = {len(group.experts): group for group in auxiliary.classes}
    assert kinds[1].experts == (2,) and auxiliary.protected == (2,)
    assert "base=skip;" in record.remarks[0].text
    before = load_expert(layer, module.weights, 2)
    after = load_expert(replace(layer, experts=auxiliary), module.weights, 2)
    assert isinstance(before, FeedForward) and isinstance(after, FeedForward)
    assert torch.equal(before.up.dense(), after.up.dense())


def test_what_a_layer_does_not_allow(mixtral: Module) -> None:
    with pytest.raises(UsageError, match="main 3 leaves no auxiliary experts: a token has 3"):
        run(mixtral, "main=3")
    with pytest.raises(UsageError, match="no smaller than the expert 0"):
        run(mixtral, "main=1 rank=1000")
    with pytest.raises(UsageError, match="calibrate"):
        moec.run_passes(Module(copy_of(mixtral).op, mixtral.weights, mixtral.source), "replace-auxiliary{main=1}")
