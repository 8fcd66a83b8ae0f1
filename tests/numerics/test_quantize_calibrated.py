"""`quantize{method=gptq}`: errors per layer, policies for experts with few tokens, and what falls back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moec.api import run_passes
from moec.dialects.quant import Integer, Span, ZeroPoint
from moec.errors import UsageError
from moec.experts import FeedForward, Quantized, find_moe_layers, load_expert, run_layer
from moec.ir import print_operation
from moec.module import Module
from moec.passes.quantizing.inputs import PRIOR_ROWS, ExpertInputs, Policy, second_moment
from moec.quantization.rounding import Target
from moec.quantization.second_order import round_second_order
from tests.experts.models import calibrate_text, copy_of, raised_model

OPTIONS = "bits=3 group=16"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Module:
    folder = tmp_path_factory.mktemp("model")
    module = raised_model("mixtral", folder)
    run_passes(module, calibrate_text(folder, rows=24))
    return module


def sample_error(source: Module, module: Module) -> float:
    """Relative squared error of all layers on the rows of the sample."""
    assert source.calibration is not None
    wrong = total = 0.0
    for old, new in zip(find_moe_layers(source.op), find_moe_layers(module.op), strict=True):
        sample = source.calibration.sample(old)
        found = run_layer(new, module.weights, sample.x, sample.router_input).y
        assert found is not None
        wrong += float((found - sample.y).double().square().sum())
        total += float(sample.y.double().square().sum())
    return wrong / total


def quantized(source: Module, options: str) -> Module:
    module = copy_of(source)
    run_passes(module, f"quantize{{{options}}}")
    return module


@pytest.mark.parametrize("policy", list(Policy))
def test_layers_move_less_than_by_rounding(source: Module, policy: Policy) -> None:
    nearest = sample_error(source, quantized(source, OPTIONS))
    found = sample_error(source, quantized(source, f"{OPTIONS} method=gptq calibration={policy.value}"))
    assert found < 0.85 * nearest


def test_descent_and_a_fitted_last_matrix_err_less(source: Module) -> None:
    options = f"{OPTIONS} method=gptq damping=0.01"
    plain = sample_error(source, quantized(source, options))
    descended = sample_error(source, quantized(source, f"{options} rounds=2"))
    assert descended < 0.95 * plain
    assert sample_error(source, quantized(source, f"{options} rounds=2 refit")) < 0.97 * descended


def test_they_go_on_from_gptq(source: Module) -> None:
    for option in ("rounds=1", "refit"):
        with pytest.raises(UsageError, match="go on from the codes of method=gptq"):
            quantized(source, f"{OPTIONS} {option}")


@pytest.mark.parametrize("ordered", [False, True])
def test_codes_are_those_of_second_order_rounding(source: Module, ordered: bool) -> None:
    """With the damping and the order that were asked for; the last matrix for what it reads behind packed ones."""
    options = f"{OPTIONS} method=gptq calibration=routed damping=0.02 act-order={str(ordered).lower()}"
    module = quantized(source, options)
    assert source.calibration is not None
    old, new = (find_moe_layers(found.op)[1] for found in (source, module))
    target = Target(Integer(3, Span.GROUP, 16, ZeroPoint.INTEGER))
    for number in range(2):
        before, after = load_expert(old, source.weights, number), load_expert(new, module.weights, number)
        assert isinstance(before, FeedForward) and isinstance(after, FeedForward)
        rows, _ = ExpertInputs(old, source.calibration.sample(old), Policy.ROUTED).rows(number)
        for one, other, x in (
            (before.up, after.up, rows),
            (before.down, after.down, after.hidden_activations(rows)),
        ):
            wanted = round_second_order(target, one.dense(), second_moment(x), damping=0.02, ordered=ordered).packed
            assert isinstance(other.matrix, Quantized) and torch.equal(other.matrix.packed.codes, wanted.codes)


def test_trits_too(source: Module) -> None:
    options = "kind=ternary ternary=symmetric group=row"
    nearest = sample_error(source, quantized(source, options))
    assert sample_error(source, quantized(source, f"{options} method=gptq")) < 0.8 * nearest


def test_equal_inputs_give_equal_text(source: Module) -> None:
    texts = [print_operation(quantized(source, f"{OPTIONS} method=gptq").op) for _ in range(2)]
    assert texts[0] == texts[1]


def test_it_needs_a_calibration(source: Module) -> None:
    module = copy_of(source)
    module.calibration = None
    with pytest.raises(UsageError, match="was not calibrated"):
        run_passes(module, "quantize{method=gptq group=16}")


def test_experts_without_tokens_are_rounded_to_nearest(source: Module, tmp_path: Path) -> None:
    """Two tokens reach four of eight experts at most."""
    module = copy_of(source)
    run_passes(module, calibrate_text(tmp_path, rows=1, length=2))
    routed = copy_of(module)
    report = run_passes(routed, f"quantize{{{OPTIONS} method=gptq calibration=routed}}")
    starved = 0
    for layer in find_moe_layers(module.op):
        assert module.calibration is not None
        inputs = ExpertInputs(layer, module.calibration.sample(layer), Policy.ROUTED)
        starved += sum(not len(inputs.rows(number)[0]) for number in range(layer.expert_count))
    assert starved >= 4 * len(find_moe_layers(module.op))
    statistics = report.records[0].statistics
    assert statistics["nearest"] == 3 * starved and statistics["damped"] == 0
    report = run_passes(module, f"quantize{{{OPTIONS} method=gptq}}")
    assert report.records[0].statistics["nearest"] == 0


def test_policies_choose_rows(source: Module) -> None:
    assert source.calibration is not None
    layer = find_moe_layers(source.op)[0]
    sample = source.calibration.sample(layer)
    counts = {
        policy: [len(ExpertInputs(layer, sample, policy).rows(number)[0]) for number in range(layer.expert_count)]
        for policy in Policy
    }
    assert counts[Policy.ROUTED] == counts[Policy.AFFINITY]
    assert sum(counts[Policy.ROUTED]) == len(sample) * layer.top_k
    assert set(counts[Policy.ALL]) == set(counts[Policy.AUTO]) == set(counts[Policy.OUTPUT]) == {len(sample)}
    mean = len(sample) * layer.top_k // layer.expert_count
    assert [max(count, mean) for count in counts[Policy.ROUTED]] == counts[Policy.BALANCED]
    rare = min(range(layer.expert_count), key=counts[Policy.ROUTED].__getitem__)
    rows, gates = sample.chosen(layer, rare)
    affinity = second_moment(*ExpertInputs(layer, sample, Policy.AFFINITY).rows(rare))
    x = sample.x[rows].double()
    assert torch.allclose(affinity, (x * gates[:, None]).T @ x)
    prior = PRIOR_ROWS / len(sample) * sample.x.double().T @ sample.x.double()
    output = second_moment(*ExpertInputs(layer, sample, Policy.OUTPUT).rows(rare))
    assert torch.allclose(output - prior, (x * (gates.square() / gates.square().mean())[:, None]).T @ x)


def test_what_fills_up_rare_experts_nearly_chose_them(source: Module) -> None:
    """The rows behind those that chose an expert are the ones that its router rates highest of the others."""
    assert source.calibration is not None
    layer = find_moe_layers(source.op)[0]
    sample = source.calibration.sample(layer)
    filled = 0
    for number in range(layer.expert_count):
        chosen, _ = sample.chosen(layer, number)
        rows, weights = ExpertInputs(layer, sample, Policy.BALANCED).rows(number)
        assert torch.equal(rows[: len(chosen)], sample.x[chosen].float()) and bool((weights == 1).all())
        scores = sample.route(layer).logits[:, number].clone()
        scores[chosen] = -torch.inf
        extra = scores.topk(len(rows) - len(chosen)).indices
        assert torch.equal(rows[len(chosen) :], sample.x[extra].float())
        filled += len(extra)
    assert filled > 0


@pytest.mark.slow
def test_training_a_block_errs_less_than_its_start(source: Module) -> None:
    options = "bits=2 group=16"
    gptq = sample_error(source, quantized(source, f"{options} method=gptq"))
    module = copy_of(source)
    report = run_passes(module, f"quantize{{{options} method=block-ap steps=40}}")
    experts = sum(layer.expert_count for layer in find_moe_layers(source.op))
    assert report.records[0].statistics["trained"] > experts / 2
    assert sample_error(source, module) < 0.95 * gptq
