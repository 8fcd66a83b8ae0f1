"""`make-replicas`: which slots read which replica, what that costs, and what the cache plan leaves out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moec.api import run_passes
from moec.artifact.summary import model_size
from moec.codegen.onnx.emit import emit_onnx
from moec.codegen.onnx.targets import Target
from moec.dialects.moe import ExpertsOp, ReplicaOp
from moec.dialects.quant import Integer, Span, ZeroPoint
from moec.errors import UsageError
from moec.experts import FeedForward, find_moe_layers, find_unreadable, load_expert, protect_experts
from moec.ir import parse_module, print_operation
from moec.ir.verifier import VerifyError, verify
from moec.module import Module
from moec.quantization.rounding import Target as Rounding
from moec.quantization.rounding import round_matrix
from moec.reference.replica import gates_before, replica_margin
from tests.codegen.running import load, run
from tests.codegen.test_compressed_models import logits
from tests.experts.models import calibrate_text, copy_of, difference, output, raised_model


def test_ranks_are_the_shares_of_larger_gates() -> None:
    gates = torch.tensor([[0.1, 0.6, 0.3], [0.25, 0.5, 0.25], [-0.5, 0.5, 0.0]])
    before, total = gates_before(gates)
    assert total[:, 0].tolist() == pytest.approx([1.0, 1.0, 1.0])
    wanted = [[0.9, 0.0, 0.6], [0.5, 0.0, 0.75], [0.0, 0.5, 1.0]]
    for row, expected in zip(before.tolist(), wanted, strict=True):
        assert row == pytest.approx(expected)
    generator = torch.Generator().manual_seed(0)
    many = torch.rand((50, 4), generator=generator)
    before, _ = gates_before(many)
    order = many.sort(descending=True, stable=True)
    sums = order.values.cumsum(1) - order.values
    assert torch.allclose(before.gather(1, order.indices), sums, atol=1e-6)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Module:
    folder = tmp_path_factory.mktemp("model")
    module = raised_model("mixtral", folder)
    run_passes(module, calibrate_text(folder))
    return module


def replicated(source: Module, options: str) -> Module:
    module = copy_of(source)
    run_passes(module, f"make-replicas{{group=16 method=rtn {options}}}")
    return module


def layer_op(module: Module) -> ExpertsOp:
    return next(op for op in module.op.walk() if isinstance(op, ExpertsOp))


def test_the_first_threshold_at_one_changes_nothing(source: Module) -> None:
    module = replicated(source, "high=1")
    assert difference(output(source), output(module)) == 0
    assert model_size(module).bytes > model_size(source).bytes
    text = print_operation(module.op)
    assert print_operation(parse_module(text)) == text
    op = layer_op(module)
    assert len(op.stored) == 16 and op.expert_count == 16 and op.stored[8:] == tuple(range(8, 16))
    choice = op.ids.defining_op
    assert isinstance(choice, ReplicaOp)
    assert float(replica_margin(choice, torch.tensor([[0.5, 0.5]]))[0]) == float("inf")
    assert not find_moe_layers(module.op)
    assert all("have replicas" in found.reason for found in find_unreadable(module.op))
    choice.high = 0.9
    choice.low = 0.6
    with pytest.raises(VerifyError, match=r"high 0\.9 and low 0\.6"):
        verify(module.op)


def test_all_low_is_the_model_in_few_bits(source: Module) -> None:
    """The best slot of a token has rank 0: replicas serve the others, and with one slot a token reads none."""
    low = copy_of(source)
    run_passes(low, "quantize{bits=2 group=16}")
    some = replicated(source, "high=0.5")
    everything, part = (difference(output(source), output(module)) for module in (low, some))
    assert 0 < part < everything
    top1 = copy_of(source)
    run_passes(top1, "set-routing{k=1}")
    before = output(top1)
    run_passes(top1, "make-replicas{group=16 method=rtn high=0}")
    assert difference(before, output(top1)) == 0


def test_low_replicas_for_low_gates_cost_least(source: Module) -> None:
    """HOBBIT's order: by rank, then at random, then the most important slots, each for the same number of slots."""
    layer = find_moe_layers(source.op)[0]
    assert source.calibration is not None
    sample = source.calibration.sample(layer)
    run_of = sample.route(layer)
    before, _ = gates_before(run_of.gates)
    target = Rounding(Integer(2, Span.GROUP, 16, ZeroPoint.INTEGER))
    change = torch.zeros(*run_of.gates.shape, layer.hidden_size)
    for number in range(layer.expert_count):
        expert = load_expert(layer, source.weights, number)
        assert isinstance(expert, FeedForward)
        rows, slots = (run_of.stored_ids == number).nonzero(as_tuple=True)
        if not len(rows):
            continue
        x = sample.x[rows].float()
        down = round_matrix(target, expert.down.dense()).dense()
        wrong = expert.hidden_activations(x) @ (down - expert.down.dense()).T
        change[rows, slots] = wrong * run_of.gates[rows, slots, None]
    low = before > 0
    count = int(low.sum())
    generator = torch.Generator().manual_seed(0)
    at_random = torch.zeros(low.numel(), dtype=torch.bool)
    at_random[torch.randperm(low.numel(), generator=generator)[:count]] = True
    masks = (low, at_random.reshape(low.shape), ~low)
    errors = [float((change * mask[:, :, None]).sum(1).square().sum()) for mask in masks]
    assert errors[0] < errors[1] < errors[2]


def test_what_a_cache_holds_gets_no_replica(source: Module) -> None:
    module = copy_of(source)
    with pytest.raises(UsageError, match="no plan of a cache"):
        run_passes(module, "make-replicas{group=16 method=rtn resident=0.5}")
    run_passes(module, "plan-cache{capacity=0.5}")
    plan = module.cache_plan
    assert plan is not None and plan.capacity == 8
    held = [sum(rate >= 0.5 for rate in rates) for rates in plan.hit_rates.values()]
    report = run_passes(module, "make-replicas{group=16 method=rtn resident=0.5}")
    statistics = report.records[0].statistics
    assert 0 < statistics["without"] == sum(held) < 16
    assert statistics["replicas"] == 16 - sum(held)
    op = layer_op(module)
    rates = next(iter(plan.hit_rates.values()))
    for expert, rate in enumerate(rates):
        assert (op.stored[8 + expert] == expert) == (rate >= 0.5)


def test_protected_experts_have_one_replica(source: Module) -> None:
    module = copy_of(source)
    protect_experts(find_moe_layers(module.op)[0], [2])
    run_passes(module, "quantize{bits=8 group=16},make-replicas{bits=2 group=16 method=gptq}")
    op = layer_op(module)
    assert op.stored[8 + 2] == 2 and op.protected == (2,)
    assert len(set(op.stored[8:])) == 8


def test_caches_and_raising_go_on(source: Module) -> None:
    module = replicated(source, "high=0.5")
    text = print_operation(module.op)
    report = run_passes(module, "raise-moe,add-kv-cache")
    assert not report.records[0].refusals and not report.records[1].refusals
    assert print_operation(module.op) != text and "past_key_values" in print_operation(module.op)


@pytest.mark.parametrize("target", list(Target), ids=lambda target: target.value)
def test_the_graph_chooses_as_the_executor(source: Module, target: Target, tmp_path: Path) -> None:
    module = replicated(source, "high=0.5 low=0.55")
    expected, feeds, kept = logits(module)
    report = emit_onnx(module, tmp_path, target=target)
    found = next(iter(run(load(tmp_path), feeds).values()))
    assert np.abs(found - expected)[kept].max() <= 1e-5 * np.abs(expected[kept]).max()
    assert report.weight_bytes == model_size(module).bytes
