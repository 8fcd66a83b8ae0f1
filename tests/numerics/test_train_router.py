"""train-router: labels against brute force, losses that fall on rows that were held out, and what stays as it is."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch

import moec
from moec.dialects.builtin import WeightOp
from moec.errors import UsageError
from moec.experts import FeedForward, MoeLayer, find_moe_layers, load_expert, run_layer
from moec.module import Module
from moec.passes.neuron_pruning.slicing import slice_neurons
from moec.passes.router_init.solutions import joined
from moec.passes.routing.labels import Labels, labels
from moec.passes.routing.router_fit import FitSettings, Loss, RouterRows, fit_router
from moec.passes.routing.training import with_soft_gates
from moec.reference.executor import Executor
from tests.experts.models import calibrate_text, copy_of, difference, output, raised_model

EXACT = 1e-9


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Module:
    module = raised_model("llama", tmp_path_factory.mktemp("llama"))
    text = calibrate_text(tmp_path_factory.mktemp("tokens"), rows=80, length=32)
    moec.run_passes(module, f"factorize{{experts=4}},{text},init-router{{kind=random}},set-routing{{k=2}}")
    return module


def changed(source: Module, pipeline: str, seed: int = 0) -> Module:
    module = copy_of(source)
    moec.run_passes(module, pipeline, seed=seed)
    return module


def experts_of(layer: MoeLayer, module: Module) -> list[FeedForward]:
    found = [load_expert(layer, module.weights, number) for number in range(layer.expert_count)]
    return [expert for expert in found if isinstance(expert, FeedForward)]


def error(module: Module) -> float:
    """Of the layers' outputs on the calibration's rows."""
    assert module.calibration is not None
    total = 0.0
    for layer in find_moe_layers(module.op):
        sample = module.calibration.sample(layer)
        y = run_layer(layer, module.weights, sample.x, sample.router_input).y
        assert y is not None
        total += float((y - sample.y).square().sum())
    return total


def router_sources(module: Module) -> list[str]:
    ops = [layer.router.tensor("weight").defining_op for layer in find_moe_layers(module.op)]
    return [op.source for op in ops if isinstance(op, WeightOp)]


def test_overlap_counts_the_most_active_neurons_of_each_expert_once(llama: Module) -> None:
    layer = find_moe_layers(llama.op)[0]
    assert llama.calibration is not None
    rows = llama.calibration.sample(layer).x[:40].float()
    first, second = experts_of(layer, llama)[:2]
    whole = joined([first, second])
    width = first.width
    sets = [set(range(width)), set(range(width // 2, width // 2 + width)), {0, 1}]
    experts = [slice_neurons(whole, torch.tensor(sorted(own))) for own in sets]
    found = labels(Labels.OVERLAP, experts, rows, rows, 1)
    mean = round(sum(map(len, sets)) / 3)
    sizes = [round(share * mean) for share in (1, 0.8, 0.6, 0.4, 0.2)]
    there = sorted(set().union(*sets))
    strength = whole.hidden_activations(rows).abs()
    for row in range(0, 40, 5):
        order = sorted(there, key=lambda neuron: -float(strength[row, neuron]))
        wanted = [sum(len(own & set(order[:size])) for size in sizes) / sum(sizes) for own in sets]
        assert found[row].tolist() == pytest.approx(wanted)


def test_a_router_that_layers_follow_learns_what_all_of_them_want(llama: Module) -> None:
    shared = changed(llama, "set-routing{k=2 scope=model}")
    trained = changed(shared, "train-router{labels=overlap loss=focal epochs=3}")
    assert len(set(router_sources(trained))) == 1 and router_sources(trained) != router_sources(shared)
    before, after = find_moe_layers(shared.op), find_moe_layers(trained.op)
    assert len({layer.router for layer in after}) == 1 < len(after)
    assert trained.calibration is not None
    wanted = torch.stack(
        [labels(Labels.OVERLAP, experts_of(layer, trained), sample.x, sample.y, 2)
         for layer in after if (sample := trained.calibration.sample(layer))]
    ).mean(0)  # fmt: skip

    def hits(layer: MoeLayer, module: Module) -> float:
        sample = llama.calibration.sample(layer)  # type: ignore[union-attr]
        given = run_layer(layer, module.weights, sample.x, sample.router_input, with_experts=False).logits
        return float((given.argmax(1) == wanted.argmax(1)).double().mean())

    assert hits(after[0], trained) > hits(before[0], shared)


def test_labels_are_those_of_brute_force(llama: Module) -> None:
    layer = find_moe_layers(llama.op)[0]
    assert llama.calibration is not None
    sample = llama.calibration.sample(layer)
    rows, y = sample.x[:1000], sample.y[:1000]
    experts = experts_of(layer, llama)
    nearest = labels(Labels.NEAREST, experts, rows, y, 2)
    outputs = torch.stack([expert.apply(rows.float()) for expert in experts]).double()
    for token in range(0, 1000, 7):
        distances = [float((out[token] - y[token].double() * 2 / 4).square().mean()) for out in outputs]
        best = sorted(range(4), key=lambda number: distances[number])[:2]
        assert nearest[token].nonzero()[:, 0].tolist() == sorted(best)
    activation = labels(Labels.ACTIVATION, experts, rows, y, 2)
    assert torch.equal(activation.amax(1), torch.ones(1000)) and float(activation.min()) >= 0
    subset = labels(Labels.BEST_SUBSET, experts, rows, y, 2)
    assert bool((subset.sum(1) == 2).all())

    def left(chosen: torch.Tensor) -> torch.Tensor:
        return (y.double() - torch.einsum("ne,enh->nh", chosen.double(), outputs)).square().sum(1)

    pairs = [torch.zeros(1000, 4).index_fill_(1, torch.tensor(pair), 1.0) for pair in combinations(range(4), 2)]
    best_pair = torch.stack([left(pair) for pair in pairs]).amin(0)
    assert float(left(subset).mean()) <= 1.1 * float(best_pair.mean()) < float(left(nearest).mean())


@pytest.mark.parametrize("options", [
    "labels=nearest loss=kl", "labels=nearest loss=bce", "labels=activation loss=bce", "labels=activation loss=ce",
    "labels=best-subset loss=bce balance=0.01",
])  # fmt: skip
def test_training_lowers_the_loss_on_rows_that_it_has_not_seen(llama: Module, options: str) -> None:
    module = copy_of(llama)
    report = moec.run_passes(module, f"train-router{{{options} epochs=6}}")
    record = report.records[-1]
    assert record.statistics["changed"] == len(find_moe_layers(module.op))
    for remark in record.remarks:
        before, after = (float(part) for part in str(remark).rpartition(": ")[2].split()[2::2])
        assert after < before
    if "nearest" not in options:
        assert error(module) < error(llama)
    assert router_sources(changed(llama, f"train-router{{{options} epochs=6}}")) == router_sources(module)


def test_the_router_gets_a_gradient(llama: Module) -> None:
    """The step that FactorLLM published has none: its gates are zero or one."""
    layer = find_moe_layers(llama.op)[0]
    assert llama.calibration is not None
    rows = RouterRows(layer, llama.weights, llama.calibration.sample(layer))
    (weight,) = rows.weights
    value = rows.values[weight].requires_grad_()
    rows.logits(torch.arange(10), {weight: value}).square().sum().backward()  # type: ignore[no-untyped-call]
    assert value.grad is not None and float(value.grad.abs().max()) > 0


def test_gates_that_are_one_let_the_router_learn(llama: Module) -> None:
    soft = with_soft_gates(llama.op)
    inputs = {name: torch.ones(1, 6, dtype=torch.int64) for name in llama.main.arg_names}
    inputs["input_ids"] = torch.arange(6)[None]
    plain = Executor(llama.op, llama.weights).run(inputs)["logits"]
    for layer in find_moe_layers(llama.op):
        weight = layer.router.tensor("weight").defining_op
        assert isinstance(weight, WeightOp)
        value = llama.weights.load(weight.source).float().requires_grad_()
        found = Executor(soft, llama.weights).run(inputs, overrides={weight.weight_name: value})["logits"]
        assert torch.equal(found, plain)
        found.square().sum().backward()  # type: ignore[no-untyped-call]
        assert value.grad is not None and float(value.grad.abs().max()) > 0


def test_the_best_held_out_weights_stay(llama: Module) -> None:
    """A step size that is far too large changes nothing where the router is the best one already."""
    fitted = changed(llama, "train-router{epochs=20}")
    assert fitted.calibration is not None
    layer = find_moe_layers(fitted.op)[0]
    sample = fitted.calibration.sample(layer)
    wanted = labels(Labels.ACTIVATION, experts_of(layer, fitted), sample.x, sample.y, 2)
    settings = FitSettings(Loss.BCE, 1, 512, 0.9, 0.0, 2, 0)
    held_out = sample.sequence % 5 == 0
    fit = fit_router(RouterRows(layer, fitted.weights, sample), wanted, held_out, settings)
    assert not fit.weights and fit.after == fit.before


def test_what_lies_in_front_of_the_router_is_trained_too(llama: Module) -> None:
    start = changed(llama, "init-router{kind=hidden-layer},set-routing{k=2}")
    module = changed(start, "train-router{epochs=8}")
    for before, after in zip(find_moe_layers(start.op), find_moe_layers(module.op), strict=True):
        names = [[op.source for op in layer.experts.parent if isinstance(op, WeightOp) and "router" in op.weight_name]
                 for layer in (before, after)]  # fmt: skip
        assert not set(names[0]) & set(names[1])
    assert error(module) < error(start)
    # what the router reads of the sample is told to the passes behind
    layer = find_moe_layers(module.op)[0]
    assert module.calibration is not None
    sample = module.calibration.sample(layer)
    assert not torch.equal(sample.router_input, start.calibration.sample(layer).router_input)  # type: ignore[union-attr]
    assert difference(output(module), output(module)) < EXACT


def test_frozen_routers_and_followers_stay(llama: Module) -> None:
    frozen = changed(llama, "init-router{kind=frozen-random}")
    module = copy_of(frozen)
    report = moec.run_passes(module, "train-router{epochs=2}")
    assert router_sources(module) == router_sources(frozen)
    assert [refusal.reason for refusal in report.records[-1].refusals] == ["its router is frozen"] * 2
    following = changed(llama, "set-routing{scope=model},train-router{epochs=2}")
    assert len(set(router_sources(following))) == 1


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("train-router{k=5}", "5 experts cannot be chosen among 4"),
        ("set-routing{k=4},train-router{labels=nearest}", "every label would be one"),
        ("train-router{rate=2}", "rate must be within 0 and 1"),
        ("train-router{epochs=0}", "epochs and batch must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(llama: Module, pipeline: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        changed(llama, pipeline)


def test_too_few_sequences_are_refused(llama: Module, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too few sequences to hold some out"):
        changed(llama, f"{calibrate_text(tmp_path, rows=1)},train-router")
