"""`quantize`: what is packed, what stays, what it takes, and how far the layers move."""

from __future__ import annotations

import pytest
import torch

from moec.api import run_passes
from moec.artifact.summary import model_size
from moec.dialects.aten import AtenOp
from moec.dialects.builtin import WeightOp
from moec.dialects.moe import ExpertsOp, RouteOp
from moec.dialects.quant import DequantOp, Integer, Levels, Span, Ternary, TritPacking, ZeroPoint
from moec.errors import UnsafeInputError, UsageError
from moec.experts import (
    Dense,
    FeedForward,
    Quantized,
    find_dense_layers,
    find_moe_layers,
    load_dense,
    load_expert,
    protect_experts,
    run_layer,
)
from moec.experts.layer import router_of
from moec.ir import parse_module, print_operation, verify
from moec.module import Module
from moec.quantization.grids import GridSettings, TernaryFit
from moec.quantization.rounding import Target, round_matrix
from tests.experts.models import copy_of, output, raised_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Module:
    """Qwen2-MoE: routed experts, a shared one with a gate, attention with biases, a head."""
    return raised_model("qwen2_moe", tmp_path_factory.mktemp("model"))


def layer_error(before: Module, after: Module, index: int = 0) -> float:
    """The relative error of one layer's experts on random rows."""
    old, new = find_moe_layers(before.op)[index], find_moe_layers(after.op)[index]
    x = torch.randn(64, old.hidden_size, generator=torch.Generator().manual_seed(0))
    wanted = run_layer(old, before.weights, x, x, torch.float64).y
    found = run_layer(new, after.weights, x, x, torch.float64).y
    assert wanted is not None and found is not None
    return float((found - wanted).norm() / wanted.norm())


def quantized(source: Module, options: str) -> Module:
    module = copy_of(source)
    run_passes(module, f"quantize{{{options}}}")
    verify(module.op)
    text = print_operation(module.op)
    assert print_operation(parse_module(text)) == text
    return module


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ("bits=8 group=16", 0.01),
        ("bits=4 group=16", 0.15),
        ("bits=4 group=16 symmetric scales=f16", 0.2),
        ("bits=3 group=row zero-points=float", 0.5),
        ("kind=nf4 group=16", 0.15),
        ("kind=nvfp4", 0.2),
        ("kind=kmeans bits=5 group=row", 0.15),
        ("kind=ternary ternary=symmetric trits=5per8 group=row", 0.9),
    ],
)
def test_layers_move_as_far_as_their_format_lets_them(source: Module, options: str, bound: float) -> None:
    module = quantized(source, options)
    assert 0 < layer_error(source, module) < bound
    assert output(module).isfinite().all()
    for layer in find_moe_layers(module.op):
        assert len(layer.experts.classes) == 1
        for number in range(layer.expert_count):
            expert = load_expert(layer, module.weights, number)
            assert isinstance(expert, FeedForward)
            assert isinstance(expert.up.matrix, Quantized) and isinstance(expert.down.matrix, Quantized)


ROUNDED = {
    "bits=4": (Integer(4, Span.GROUP, 16, ZeroPoint.INTEGER), GridSettings()),
    "bits=3 search": (Integer(3, Span.GROUP, 16, ZeroPoint.INTEGER), GridSettings(search=True)),
    "bits=3 scales=bf16": (Integer(3, Span.GROUP, 16, ZeroPoint.INTEGER), GridSettings(torch.bfloat16)),
    "kind=ternary ternary=absmean scales=f16 trits=5per8": (
        Ternary(Levels.SCALE, Span.GROUP, 16, TritPacking.FIVE_PER_BYTE),
        GridSettings(torch.float16, ternary=TernaryFit.ABSMEAN),
    ),
}


@pytest.mark.parametrize("options", ROUNDED)
def test_codes_are_those_of_rounding(source: Module, options: str) -> None:
    module = quantized(source, f"{options} group=16 sides=up,down")
    target = Target(*ROUNDED[options])
    old, new = find_moe_layers(source.op)[1], find_moe_layers(module.op)[1]
    for number in range(old.expert_count):
        before, after = load_expert(old, source.weights, number), load_expert(new, module.weights, number)
        assert isinstance(before, FeedForward) and isinstance(after, FeedForward)
        assert before.gate is not None and after.gate is not None
        assert isinstance(after.gate.matrix, Dense) and torch.equal(after.gate.dense(), before.gate.dense())
        assert isinstance(after.up.matrix, Quantized)
        packed, wanted = after.up.matrix.packed, round_matrix(target, before.up.dense())
        assert packed.format == wanted.format and packed.scales.dtype is target.settings.scale_dtype
        assert torch.equal(packed.codes, wanted.codes) and torch.equal(packed.scales, wanted.scales)


def test_parts_of_the_model(source: Module) -> None:
    """Each part alone, and all: routers stay, and nothing else is touched."""
    counts = {}
    for what in ("experts", "dense", "attention", "embedding", "router", "all"):
        module = quantized(source, f"what={what} bits=8 group=16")
        outside = [op for op in module.main.body if isinstance(op, DequantOp)]
        inside = sum(isinstance(op, DequantOp) for op in module.op.walk()) - len(outside)
        counts[what] = (inside, len(outside))
        for op in module.op.walk():
            if isinstance(op, RouteOp):
                router = router_of(op)
                assert router is not None
                is_packed = isinstance(router.tensor("weight").defining_op, DequantOp)
                assert is_packed == (what == "router")
        assert float((output(module) - output(source)).abs().max()) < 0.1 * float(output(source).abs().max())
    layers = len(find_moe_layers(source.op))
    assert counts["experts"] == (3 * layers, 0)
    assert counts["dense"] == (3 * len(find_dense_layers(source.op)), 0)
    assert counts["attention"] == (0, 4 * layers)
    # the table and the head
    assert counts["embedding"] == (0, 2)
    assert counts["router"] == (0, layers)
    assert counts["all"] == (counts["experts"][0] + counts["dense"][0], 4 * layers + 2)


def test_small_gates_stay(source: Module) -> None:
    module = quantized(source, "what=all bits=8 group=16")
    gates = [op for op in module.main.body if isinstance(op, AtenOp) and "shared_expert_gate" in op.location.name]
    assert gates
    for op in gates:
        if op.name == "aten.linear.default":
            assert isinstance(op.tensor("weight").defining_op, WeightOp)


def test_dense_blocks_are_read_back(source: Module) -> None:
    module = quantized(source, "what=dense bits=8 group=16")
    for layer in find_dense_layers(module.op):
        block = load_dense(layer, module.weights)
        assert isinstance(block.up.matrix, Quantized)


def test_statistics_are_the_bytes_of_the_model(source: Module) -> None:
    module = copy_of(source)
    statistics = run_passes(module, "quantize{bits=4 group=16}").records[0].statistics
    before, after = model_size(source), model_size(module)
    stack = find_moe_layers(source.op)[0].experts.weights[0].defining_op
    assert isinstance(stack, WeightOp)
    itemsize = source.weights.shape_dtype(stack.source)[1].itemsize
    assert after.bytes == before.bytes - statistics["weights"] * itemsize + statistics["bytes-after"]
    # 4 bits, 32 bits of scale and 4 of zero point per group, whose last byte may be half full
    assert 4 + 36 / 16 <= 8 * statistics["bytes-after"] / statistics["weights"] <= 4 + 40 / 16


def test_packed_factored_and_protected_experts_stay(source: Module) -> None:
    module = copy_of(source)
    protect_experts(find_moe_layers(module.op)[0], [1])
    run_passes(module, "low-rank{rank=4 basis=plain sides=up},quantize{bits=4 group=16}")
    layer = find_moe_layers(module.op)[0]
    kept = load_expert(layer, module.weights, 1)
    assert isinstance(kept, FeedForward) and isinstance(kept.up.matrix, Dense) and isinstance(kept.down.matrix, Dense)
    other = load_expert(layer, module.weights, 0)
    assert isinstance(other, FeedForward)
    assert not isinstance(other.up.matrix, Quantized) and isinstance(other.down.matrix, Quantized)
    text = print_operation(module.op)
    report = run_passes(module, "quantize{bits=2 group=16}")
    assert print_operation(module.op) == text
    reasons = [refusal.reason for refusal in report.records[0].refusals]
    assert any("down is packed already" in reason for reason in reasons)
    assert any("up is factored" in reason for reason in reasons)
    assert "nothing was packed" in report.warnings()[0] and "packed already" in report.warnings()[0]


def test_what_was_asked_for_and_not_done_is_told(source: Module) -> None:
    """Also where another part was packed, outside of experts, and where there is nothing of the kind."""
    module = copy_of(source)
    run_passes(module, "quantize{what=experts,attention bits=4 group=16}")
    report = run_passes(module, "quantize{what=attention bits=3 group=16}")
    assert report.records[0].statistics.get("matrices", 0) == 0
    assert "nothing was packed" in report.warnings()[0] and "attention matrix is packed already" in report.warnings()[0]
    layers = find_moe_layers(module.op)
    report = run_passes(module, "quantize{what=all bits=3 group=16}")
    left = sum(3 * layer.expert_count + 4 for layer in layers)
    assert f"weights stay as they are in {left} places" in report.warnings()[0]
    experts = copy_of(source)
    for layer in find_moe_layers(experts.op):
        protect_experts(layer, range(layer.expert_count))
    (warning,) = run_passes(experts, "quantize{bits=4 group=16}").warnings()
    assert "no weights of what=experts, or protects them" in warning
    assert not run_passes(copy_of(source), "quantize{what=all bits=8 group=16}").warnings()


def test_groups_that_do_not_divide_are_named(source: Module) -> None:
    with pytest.raises(UsageError, match="groups of 32 do not divide rows of 48 weights") as caught:
        quantized(source, "bits=4 group=32")
    assert "expert 0, down" in caught.value.where and "16" in caught.value.hint


def test_equal_inputs_give_equal_text(source: Module) -> None:
    options = "what=all kind=kmeans bits=3 group=16"
    first, second = (print_operation(quantized(source, options).op) for _ in range(2))
    assert first == second


def test_weights_that_are_no_numbers(source: Module) -> None:
    module = copy_of(source)
    layer = find_moe_layers(module.op)[0]
    stack = layer.experts.weights[0].defining_op
    assert isinstance(stack, WeightOp) and module.weights.store is not None
    broken = module.weights.load(stack.source)
    broken[2, 0, 0] = torch.nan
    stack.source = str(module.weights.store.put(broken))
    with pytest.raises(UnsafeInputError, match="NaN or infinity") as caught:
        run_passes(module, "quantize{bits=4 group=row}")
    assert "expert 2" in caught.value.where
    assert sum(isinstance(op, ExpertsOp) for op in module.op.walk()) == len(find_moe_layers(module.op))
