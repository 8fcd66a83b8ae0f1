"""Calibration against sums made by hooks on transformers' own model, and what must not change it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from moec.api import run_passes
from moec.calibration.calibration import Calibration, sample_statistics
from moec.calibration.sample import LayerSample
from moec.calibration.second_moments import hidden_second_moment, input_second_moment, neuron_gradient_square
from moec.calibration.statistics import LayerStatistics
from moec.experts.layer import MoeLayer, find_moe_layers
from moec.module import Module
from tests.frontend.tiny_models import tiny_model
from tests.numerics.calibrated_models import LayerRows, hooked_run, raised, random_sequences, write_tokens

# transformers keeps float32 in norms and in the router's softmax
BOUND = 1e-5
LENGTHS = (12, 7, 12, 1, 9)
MODELS = {
    "softmax, renormalised": ("mixtral", {}),
    "sigmoid, selection bias, groups": ("deepseek_v3", {}),
    "softmax, not renormalised": ("qwen2_moe", {"norm_topk_prob": False}),
}


def calibrated(module: Module, tokens: Path, options: str = "", seed: int = 0) -> Calibration:
    run_passes(module, f"calibrate{{tokens={tokens} precision=float64 gradients {options}}}", seed=seed)
    assert module.calibration is not None
    return module.calibration


def near(found: torch.Tensor, expected: torch.Tensor, bound: float = BOUND) -> bool:
    scale = max(float(expected.abs().max()), 1e-12)
    return found.shape == expected.shape and float((found - expected).abs().max()) <= bound * scale


@pytest.mark.parametrize("kind", MODELS)
def test_equals_sums_by_hooks_on_transformers(kind: str, tmp_path: Path) -> None:
    model_type, settings = MODELS[kind]
    model = tiny_model(model_type, **settings)
    model.save_pretrained(str(tmp_path))
    sequences = random_sequences(LENGTHS)
    module = raised(tmp_path)
    calibration = calibrated(module, write_tokens(tmp_path / "tokens.json", sequences), "batch=3")
    layers = find_moe_layers(module.op)
    expected = hooked_run(model, sequences)
    assert len(layers) == len(expected) > 0
    for layer, rows in zip(layers, expected, strict=True):
        found, sample = calibration.statistics(layer), calibration.sample(layer)
        x, gates, gradient = rows.all("x"), rows.all("gates"), rows.all("gradient")
        assert calibration.tokens == found.tokens == len(x) == sum(LENGTHS)
        assert torch.equal(sample.sequence, torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)))
        assert near(sample.x, x)
        assert near(sample.router_input, x)
        assert near(sample.y, rows.all("y"))
        assert sample.gradient is not None and near(sample.gradient, gradient)
        assert found.layer_gradient_energy == pytest.approx(float(gradient.square().sum() / len(x)), rel=BOUND)
        logits = x @ rows.router.double().T
        assert near(found.logit_gram, logits.T @ logits)
        assert near(found.logit_sum, logits.sum(0))
        chosen = torch.zeros(len(x), layer.expert_count, dtype=torch.float64)
        chosen.scatter_add_(1, rows.all("ids"), torch.ones_like(gates))
        assert torch.equal(found.coactivation, chosen.T @ chosen)
        for expert in range(layer.expert_count):
            _check_expert(expert, found, rows)
            _check_moments(expert, layer, sample, rows)


def _of_expert(expert: int, rows: LayerRows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows, their gates, their x) of the tokens that chose an expert."""
    hit = rows.all("ids") == expert
    at = hit.any(1).nonzero()[:, 0]
    gates = torch.where(hit, rows.all("gates"), 0.0).sum(1)[at]
    return at, gates, rows.all("x")[at]


def _check_expert(expert: int, found: LayerStatistics, rows: LayerRows) -> None:
    at, g, x = _of_expert(expert, rows)
    assert found.count[expert] == len(at)
    f, phi = rows.output(expert, x), rows.hidden(expert, x)
    norm = f.norm(dim=1)
    expected = {
        "gate_mass": g.sum(),
        "output_norm_sum": norm.sum(),
        "output_square_sum": norm.square().sum(),
        "gated_norm_sum": (g * norm).sum(),
        "gated_square_sum": (g * norm).square().sum(),
        "output_max": f.abs().max() if len(f) else torch.tensor(0.0),
        "output_sum": f.sum(0),
        "neuron_gated_square": (g[:, None] * phi).square().sum(0),
        "neuron_square": phi.square().sum(0),
        "neuron_gated_max": (g[:, None] * phi).abs().amax(0) if len(f) else torch.zeros(phi.shape[1]),
    }
    for name, value in expected.items():
        assert near(getattr(found, name)[expert], value.double()), name


def _check_moments(expert: int, layer: MoeLayer, sample: LayerSample, rows: LayerRows) -> None:
    at, g, x = _of_expert(expert, rows)
    phi = rows.hidden(expert, x)
    gated = g.square()[:, None]
    # experts are loaded in float32
    assert near(input_second_moment(layer, sample, expert), x.T @ (gated * x), 1e-4)
    assert near(input_second_moment(layer, sample, expert, gated=False), x.T @ x, 1e-4)
    assert near(hidden_second_moment(layer, sample, expert), phi.T @ (gated * phi), 1e-4)
    along = rows.all("gradient")[at] @ rows.module.down_proj[expert]
    assert near(neuron_gradient_square(layer, sample, expert), (along * g[:, None] * phi).square().sum(0), 1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose selection bias keeps every token away from expert 3, and tokens."""
    path = tmp_path_factory.mktemp("model")
    model = tiny_model("deepseek_v3")
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer[3] = -100.0
    model.save_pretrained(str(path))
    write_tokens(path / "tokens.json", random_sequences(LENGTHS))
    return path


def statistics_of(folder: Path, tokens: Path, options: str = "") -> dict[str, LayerStatistics]:
    module = raised(folder)
    calibration = calibrated(module, tokens, options)
    return {layer.name: calibration.statistics(layer) for layer in find_moe_layers(module.op)}


def same(left: LayerStatistics, right: LayerStatistics, bound: float) -> bool:
    for field in fields(LayerStatistics):
        a, b = getattr(left, field.name), getattr(right, field.name)
        pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
        if not all(near(torch.as_tensor(x), torch.as_tensor(y), bound) for x, y in pairs):
            return False
    return True


def test_batch_size_order_and_padding_do_not_matter(folder: Path, tmp_path: Path) -> None:
    """V14: batches of one have no padding, batches of five have, and sequences may come in another order."""
    tokens = folder / "tokens.json"
    alone = statistics_of(folder, tokens, "batch=1")
    turned = write_tokens(tmp_path / "turned.json", random_sequences(LENGTHS)[::-1])
    for other in (statistics_of(folder, tokens, "batch=5"), statistics_of(folder, turned, "batch=2")):
        for name, statistics in alone.items():
            assert same(statistics, other[name], 1e-9), name


def test_an_expert_that_no_token_chose_has_zeros_and_is_named(folder: Path) -> None:
    module = raised(folder)
    report = run_passes(module, f"calibrate{{tokens={folder / 'tokens.json'} coverage=2 all-experts}}")
    assert module.calibration is not None
    for layer in find_moe_layers(module.op):
        statistics = module.calibration.statistics(layer)
        assert statistics.count[3] == statistics.gate_mass[3] == statistics.output_max[3] == 0
        assert not statistics.neuron_gated_square[3].any()
        assert all(torch.as_tensor(value).isfinite().all() for value in (statistics.output_sum, statistics.logit_gram))
        assert statistics.count.sum() == 2 * sum(LENGTHS)
        assert not input_second_moment(layer, module.calibration.sample(layer), 3).any()
        assert not module.calibration.redirect_distortion(layer)[3].any()
    (record,) = report.records
    assert record.statistics["starved"] >= 2
    assert any("the experts" in remark.text and " 3 (0)" in remark.text for remark in record.remarks)


def test_gates_of_router_outputs_that_share_an_expert_add(folder: Path) -> None:
    """The walk, which meets such tokens twice, against the sample, which is computed in another way."""
    before = raised(folder)
    single = calibrated(before, folder / "tokens.json")
    (plain, *_) = find_moe_layers(before.op)
    apart = single.statistics(plain)
    together = apart.coactivation - torch.diag(apart.coactivation.diagonal())
    one, other = sorted(divmod(int(together.argmax()), len(together)))
    assert together[one, other] > 0
    module = raised(folder)
    (first, *_) = find_moe_layers(module.op)
    first.experts.stored = tuple(one if output == other else output for output in range(len(first.stored)))
    calibration = calibrated(module, folder / "tokens.json")
    (layer, *_) = find_moe_layers(module.op)
    found = calibration.statistics(layer)
    assert found.count[one] == apart.count[one] + apart.count[other] - together[one, other]
    assert float(found.gate_mass[one]) == pytest.approx(float(apart.gate_mass[[one, other]].sum()), rel=1e-12)
    assert found.count[other] == 0
    again = sample_statistics(layer, calibration.sample(layer), found.layer_gradient_energy)
    assert same(again, found, 1e-4)


def test_statistics_of_a_changed_layer_are_those_of_the_layer_as_it_is(folder: Path) -> None:
    module = raised(folder)
    calibration = calibrated(module, folder / "tokens.json")
    first, second = find_moe_layers(module.op)
    before = calibration.statistics(first)
    first.experts.protected = (1,)
    assert torch.equal(calibration.statistics(first).gate_mass, before.gate_mass)
    first.experts.stored = tuple(reversed(first.stored))
    changed = find_moe_layers(module.op)[0]
    after = calibration.statistics(changed)
    assert near(after.count, before.count.flip(0))
    assert near(after.gate_mass, before.gate_mass.flip(0))
    assert not near(after.output_sum, before.output_sum.flip(0))
    assert torch.equal(
        calibration.statistics(second).count, calibration.statistics(find_moe_layers(module.op)[1]).count
    )


def test_a_reservoir_is_spread_evenly_and_the_same_in_all_layers(folder: Path) -> None:
    module = raised(folder)
    calibration = calibrated(module, folder / "tokens.json", "reservoir=10")
    everything = calibrated(raised(folder), folder / "tokens.json")
    rows = [at * sum(LENGTHS) // 10 for at in range(10)]
    for layer in find_moe_layers(module.op):
        sample, whole = calibration.sample(layer), everything.sample(layer)
        assert torch.equal(sample.x, whole.x[rows])
        assert torch.equal(sample.y, whole.y[rows])
        assert sample.gradient is not None and whole.gradient is not None
        assert torch.equal(sample.gradient, whole.gradient[rows])
        assert torch.equal(sample.sequence, whole.sequence[rows])
        assert calibration.statistics(layer).tokens == sum(LENGTHS)


def test_the_store_recalls_what_the_same_model_did_on_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    tokens = folder / "tokens.json"
    module = raised(folder, tmp_path)
    first = calibrated(module, tokens)
    again = raised(folder, tmp_path)
    second = calibrated(again, tokens)
    assert (first.from_cache, second.from_cache) == (False, True)
    for one, other in zip(find_moe_layers(module.op), find_moe_layers(again.op), strict=True):
        assert same(first.statistics(one), second.statistics(other), 0.0)
        assert torch.equal(first.sample(one).y, second.sample(other).y)
    assert not calibrated(raised(folder, tmp_path), tokens, "batch=2").from_cache
    other_tokens = write_tokens(tmp_path / "other.json", random_sequences(LENGTHS, seed=1))
    assert not calibrated(raised(folder, tmp_path), other_tokens).from_cache
    changed = raised(folder, tmp_path)
    find_moe_layers(changed.op)[0].experts.stored = tuple(range(8))[::-1]
    assert not calibrated(changed, tokens).from_cache
