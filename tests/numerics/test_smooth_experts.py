"""`smooth-experts`: the function stays, and rounded activations of layers with outlier channels err far less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moec.api import run_passes
from moec.dialects.builtin import WeightOp
from moec.dialects.nn import RMSNormOp
from moec.errors import UsageError
from moec.experts import FeedForward, MoeLayer, find_moe_layers, load_expert
from moec.module import Module
from moec.passes.smooth_experts import fold_factors
from tests.experts.models import calibrate_text, copy_of, difference, output, raised_model

OUTLIERS = (3, 17, 40)


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Module:
    """Three channels in front of experts are 64 times as large, and the columns that read them as much smaller."""
    folder = tmp_path_factory.mktemp(request.param)
    module = raised_model(request.param, folder)
    for layer in find_moe_layers(module.op):
        factors = torch.ones(layer.hidden_size, dtype=torch.float64)
        factors[list(OUTLIERS)] = 1 / 64
        assert fold_factors(layer, factors, module.weights) is None
    run_passes(module, calibrate_text(folder))
    return module


def norm_of(layer: MoeLayer) -> RMSNormOp:
    op = layer.experts.x.defining_op
    while op is not None and not isinstance(op, RMSNormOp):
        op = op.operands[0].defining_op
    assert op is not None
    return op


def four_bits(values: torch.Tensor) -> torch.Tensor:
    """Each row rounded to 15 levels up to its largest absolute value, as kernels with 4-bit activations do."""
    scale = values.abs().amax(1, keepdim=True) / 7
    return (values / scale).round() * scale


def rounded_error(module: Module, folder: Path) -> float:
    """Relative squared error of the first products of the experts of layer 0 if weights and activations have 4 bits."""
    fresh = copy_of(module)
    run_passes(fresh, calibrate_text(folder))
    layer = find_moe_layers(fresh.op)[0]
    assert fresh.calibration is not None
    sample = fresh.calibration.sample(layer)
    wrong = total = 0.0
    for number in range(layer.expert_count):
        expert = load_expert(layer, module.weights, number)
        assert isinstance(expert, FeedForward)
        rows, _ = sample.chosen(layer, number)
        x, weight = sample.x[rows], expert.up.dense()
        exact = x @ weight.T
        wrong += float((four_bits(x) @ four_bits(weight).T - exact).square().sum())
        total += float(exact.square().sum())
    return wrong / total


@pytest.mark.parametrize("options", ["", "{aggregate=mean}", "{alpha=0.5 router=false}"])
def test_outliers_go_and_the_function_stays(source: Module, options: str, tmp_path: Path) -> None:
    module = copy_of(source)
    report = run_passes(module, f"smooth-experts{options}")
    assert report.records[0].statistics["smoothed"] == len(find_moe_layers(source.op))
    wanted = output(source)
    assert difference(wanted, output(module)) < 1e-12
    # powers of two are exact in single precision, too
    assert torch.equal(output(source, torch.float32), output(module, torch.float32)) or (
        difference(output(source, torch.float32), output(module, torch.float32)) < 1e-5
    )
    assert rounded_error(module, tmp_path) < 0.05 * rounded_error(source, tmp_path)


@pytest.mark.parametrize("aggregate", ["max", "mean"])
@pytest.mark.parametrize(("alpha", "router"), [(0.6, True), (0.3, False)])
def test_factors_are_those_of_the_formula(source: Module, aggregate: str, alpha: float, router: bool) -> None:
    """max|x_j|^a / max|W_:j|^(1 - a) of each expert and the router, joined, of geometric mean 1, to powers of two."""
    module = copy_of(source)
    run_passes(module, f"smooth-experts{{alpha={alpha} aggregate={aggregate} router={str(router).lower()}}}")
    assert source.calibration is not None
    layer, changed = (find_moe_layers(found.op)[0] for found in (source, module))
    sample = source.calibration.sample(layer)
    pairs = []
    for number in range(layer.expert_count):
        expert = load_expert(layer, source.weights, number)
        assert isinstance(expert, FeedForward) and expert.gate is not None
        pairs.append((sample.x[sample.chosen(layer, number)[0]], torch.cat([expert.gate.dense(), expert.up.dense()])))
    if router:
        weight = layer.router.tensor("weight").defining_op
        assert isinstance(weight, WeightOp)
        pairs.append((sample.router_input, source.weights.load(weight.source)))
    wishes = [
        x.double().abs().amax(0) ** alpha / matrix.double().abs().amax(0) ** (1 - alpha)
        for x, matrix in pairs
        if len(x)
    ]
    joined = torch.stack(wishes).amax(0) if aggregate == "max" else torch.stack(wishes).mean(0)
    wanted = torch.exp2((joined / joined.log().mean().exp()).log2().round())
    assert torch.equal(ratio_of_norms(source, layer, module, changed).double(), wanted)


def ratio_of_norms(source: Module, layer: MoeLayer, module: Module, changed: MoeLayer) -> torch.Tensor:
    before, after = (norm_of(found).weight for found in (layer, changed))
    assert before is not None and isinstance(before.defining_op, WeightOp)
    assert after is not None and isinstance(after.defining_op, WeightOp)
    return source.weights.load(before.defining_op.source) / module.weights.load(after.defining_op.source)


def test_factors_are_powers_of_two(source: Module) -> None:
    module = copy_of(source)
    run_passes(module, "smooth-experts")
    for old, new in zip(find_moe_layers(source.op), find_moe_layers(module.op), strict=True):
        ratio = ratio_of_norms(source, old, module, new)
        assert torch.equal(ratio.log2(), ratio.log2().round())
        assert bool((ratio[list(OUTLIERS)] > ratio.median()).all())


def test_the_calibration_goes(source: Module) -> None:
    module = copy_of(source)
    run_passes(module, "smooth-experts")
    with pytest.raises(UsageError, match="was not calibrated"):
        run_passes(module, "quantize{method=gptq group=16}")
