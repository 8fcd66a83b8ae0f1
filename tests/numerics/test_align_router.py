"""`align-router`: refitted routers choose as the calibrated model did, and clipped rows keep more than rounded ones."""

from __future__ import annotations

import pytest
import torch

from moec.api import run_passes
from moec.dialects.quant import DequantOp, Integer
from moec.experts import find_moe_layers, run_layer
from moec.ir import print_operation
from moec.module import Module
from tests.experts.models import calibrate_text, copy_of, difference, output, raised_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Module:
    folder = tmp_path_factory.mktemp("model")
    module = raised_model("mixtral", folder)
    run_passes(module, calibrate_text(folder, rows=32))
    return module


def test_refitted_routers_choose_as_before(source: Module) -> None:
    module = copy_of(source)
    report = run_passes(module, "quantize{kind=ternary group=row},align-router")
    statistics = report.records[1].statistics
    assert statistics["aligned"] == len(find_moe_layers(module.op))
    assert statistics["before"] < statistics["after"] <= 10_000
    assert module.calibration is source.calibration


def test_nothing_changes_where_nothing_changed(source: Module) -> None:
    """The routers of the calibrated model are where the divergence is zero already."""
    module = copy_of(source)
    statistics = run_passes(module, "align-router").records[0].statistics
    assert statistics["before"] == statistics["after"] == 10_000
    assert difference(output(source), output(module)) < 1e-5


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clipping_keeps_more_choices(source: Module, bits: int) -> None:
    module = copy_of(source)
    statistics = run_passes(module, f"align-router{{method=clip bits={bits}}}").records[0].statistics
    assert statistics["after"] >= statistics["before"]
    packed = [op for op in module.main.body if isinstance(op, DequantOp)]
    assert [op.format for op in packed] == [Integer(bits)] * len(find_moe_layers(source.op))
    assert output(module, torch.float32).isfinite().all()


def test_eight_bits_are_enough(source: Module) -> None:
    module = copy_of(source)
    statistics = run_passes(module, "align-router{method=clip top-share=1}").records[0].statistics
    assert statistics["after"] > 9_800
    report = run_passes(module, "align-router{method=clip}")
    reasons = [refusal.reason for refusal in report.records[0].refusals]
    assert reasons == ["its router is packed already"] * len(find_moe_layers(source.op))


def test_experts_that_nobody_prefers_count_where_that_is_asked(source: Module) -> None:
    assert source.calibration is not None
    divergences = []
    for share in (0, 1):
        module = copy_of(source)
        run_passes(module, f"align-router{{method=clip bits=2 top-share={share}}}")
        old, new = (find_moe_layers(found.op)[0] for found in (source, module))
        rows = source.calibration.sample(old).router_input
        p, q = (
            run_layer(layer, source.weights, rows, rows, with_experts=False).logits.double().log_softmax(1)
            for layer in (old, new)
        )
        divergences.append(float((p.exp() * (p - q)).sum(1).mean()))
    assert divergences[1] < 0.98 * divergences[0]


def test_equal_inputs_give_equal_text(source: Module) -> None:
    texts = []
    for _ in range(2):
        module = copy_of(source)
        run_passes(module, "quantize{bits=2 group=16},align-router")
        texts.append(print_operation(module.op))
    assert texts[0] == texts[1]
