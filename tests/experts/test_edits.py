"""Edits of layers with experts: what must not change the model does not, and what must does as said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moec.dialects.builtin import WeightOp
from moec.experts import (
    Affine,
    Constant,
    Dense,
    EditError,
    Expert,
    FeedForward,
    LowRank,
    MoeLayer,
    Projection,
    alias_experts,
    find_moe_layers,
    load_expert,
    permute_experts,
    protect_experts,
    replace_experts,
    replace_router,
    run_layer,
    slice_experts,
)
from moec.ir import parse_module, print_operation, structurally_equal
from moec.module import Module
from tests.experts.models import copy_of, difference, output, raised_model

MODEL_TYPES = ("mixtral", "gpt_oss", "deepseek_v3", "qwen2_moe")
EXACT = 1e-9
# new tensors are stored in float32
STORED = 1e-6


@pytest.fixture(scope="module", params=MODEL_TYPES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Module:
    return raised_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return raised_model("mixtral", tmp_path_factory.mktemp("mixtral"))


def first_layer(module: Module) -> MoeLayer:
    return find_moe_layers(module.op)[0]


def change_each(module: Module, change: Callable[[FeedForward], Expert], *numbers: int) -> MoeLayer:
    """Applies `change` to experts of the first layer (default: all)."""
    layer = first_layer(module)
    new = {}
    for number in numbers or range(layer.expert_count):
        expert = load_expert(layer, module.weights, number, torch.float64)
        assert isinstance(expert, FeedForward)
        new[number] = change(expert)
    return replace_experts(layer, module.weights, new)


def with_neurons(expert: FeedForward, neurons: torch.Tensor) -> FeedForward:
    def rows(projection: Projection) -> Projection:
        bias = None if projection.bias is None else projection.bias[neurons]
        return Projection(Dense(projection.dense()[neurons]), bias)

    gate = None if expert.gate is None else rows(expert.gate)
    down = replace(expert.down, matrix=Dense(expert.down.dense()[:, neurons]))
    return replace(expert, gate=gate, up=rows(expert.up), down=down)


def factored(projection: Projection, base: torch.Tensor | None = None) -> Projection:
    u, s, v = torch.linalg.svd(projection.dense() - (0 if base is None else base), full_matrices=False)
    return replace(projection, matrix=LowRank(u * s, v, base))


def test_a_loaded_expert_computes_what_the_layer_computes(source: Module) -> None:
    layer = first_layer(source)
    rows = torch.randn(7, layer.hidden_size, dtype=torch.float64)
    run = run_layer(layer, source.weights, rows, rows, torch.float64)
    assert run.y is not None
    expected = torch.zeros_like(rows)
    for number in range(layer.expert_count):
        outputs = load_expert(layer, source.weights, number, torch.float64).apply(rows)
        gate = torch.where(run.stored_ids == number, run.gates, 0.0).sum(1, keepdim=True)
        expected += gate * outputs
    assert difference(run.y, expected) < EXACT


def test_moving_experts_changes_nothing(source: Module) -> None:
    module = copy_of(source)
    layer = first_layer(module)
    order = list(reversed(range(layer.outputs)))
    if layer.route.routing.groups > 1:
        with pytest.raises(EditError, match="groups"):
            permute_experts(layer, order)
        return
    permute_experts(layer, order)
    assert difference(output(source), output(module)) < EXACT


def test_experts_that_were_not_changed_stay_in_their_files(source: Module) -> None:
    module = copy_of(source)
    layer = change_each(module, lambda expert: expert)
    assert difference(output(source), output(module)) < EXACT
    weights = [op for op in module.op.walk() if isinstance(op, WeightOp) and op.weight_name.startswith(layer.name)]
    assert len(weights) >= 3
    assert not any("stored" in op.source for op in weights)


def test_neurons_in_another_order_give_the_same_expert(source: Module) -> None:
    """V5."""
    module = copy_of(source)
    layer = change_each(module, lambda expert: with_neurons(expert, torch.randperm(expert.width)), 1, 2)
    assert len(layer.experts.classes) == 1
    assert difference(output(source), output(module)) < STORED


def test_factors_of_full_rank_with_and_without_a_base_give_the_same_layer(source: Module) -> None:
    module = copy_of(source)
    experts = [load_expert(first_layer(module), module.weights, number, torch.float64) for number in (2, 3)]
    base = sum(expert.up.dense() for expert in experts if isinstance(expert, FeedForward)).float().double()
    change_each(module, lambda expert: replace(expert, up=factored(expert.up), down=factored(expert.down)), 1)
    layer = change_each(module, lambda expert: replace(expert, up=factored(expert.up, base)), 2, 3)
    assert [(group.experts, group.shared) for group in layer.experts.classes] == [
        (tuple(number for number in range(layer.expert_count) if number not in (1, 2, 3)), 0),
        ((1,), 0),
        ((2, 3), 1),
    ]
    assert difference(output(source), output(module)) < STORED
    again = load_expert(layer, module.weights, 2, torch.float64)
    assert isinstance(again, FeedForward) and isinstance(again.up.matrix, LowRank)
    assert torch.equal(again.up.matrix.base, base)
    assert structurally_equal(parse_module(print_operation(module.op), "again"), module.op)


def test_experts_of_several_widths_and_kinds_run_and_are_read_again(source: Module) -> None:
    module = copy_of(source)
    hidden = first_layer(module).hidden_size
    change_each(module, lambda expert: with_neurons(expert, torch.arange(5)), 0)
    change_each(module, lambda expert: Constant(torch.arange(hidden) / hidden), 1, 4)
    layer = change_each(
        module, lambda expert: Affine(torch.randn(hidden, 2), torch.randn(2, hidden), torch.ones(hidden)), 5
    )
    assert [type(load_expert(layer, module.weights, number)).__name__ for number in (0, 1, 4, 5)] == [
        "FeedForward", "Constant", "Constant", "Affine",
    ]  # fmt: skip
    rows = torch.randn(40, hidden, dtype=torch.float64)
    run = run_layer(layer, module.weights, rows, rows, torch.float64)
    expected = torch.zeros_like(rows)
    for number in range(layer.expert_count):
        gate = torch.where(run.stored_ids == number, run.gates, 0.0).sum(1, keepdim=True)
        expected += gate * load_expert(layer, module.weights, number, torch.float64).apply(rows)
    assert run.y is not None
    assert difference(run.y, expected) < EXACT
    assert output(module).isfinite().all()


def test_dropping_outputs_is_choosing_among_the_others(mixtral: Module) -> None:
    module = copy_of(mixtral)
    layer, before = first_layer(module), first_layer(mixtral)
    keep = [0, 2, 3, 6]
    layer = slice_experts(layer, keep)
    assert (layer.outputs, layer.expert_count) == (4, 4)
    rows = torch.randn(64, layer.hidden_size, dtype=torch.float64)
    logits = run_layer(before, mixtral.weights, rows, rows, torch.float64).logits
    expected = logits[:, keep].topk(2).indices
    run = run_layer(layer, module.weights, rows, rows, torch.float64)
    assert torch.equal(run.ids, expected)
    assert torch.allclose(run.logits, logits[:, keep])
    assert torch.allclose(run.gates.sum(1), torch.ones(64, dtype=torch.float64))
    assert output(module).isfinite().all()


def test_dropping_keeps_selection_biases_and_groups_in_step(tmp_path: Path) -> None:
    """V2 and V3."""
    module = raised_model("deepseek_v3", tmp_path)
    layer = first_layer(module)
    with pytest.raises(EditError, match="groups of equal size"):
        slice_experts(layer, [0, 1, 2, 3, 4])
    groups = layer.route.routing.groups
    size = layer.outputs // groups
    keep = [output for output in range(layer.outputs) if output % size < size - 1] if size > 2 else [0, 1, 2, 3]
    before = run_layer(layer, module.weights, *[torch.randn(9, layer.hidden_size)] * 2)
    layer = slice_experts(layer, keep) if size > 2 else layer
    assert layer.route.select_bias is not None
    assert before.y is not None and output(module).isfinite().all()


def test_outputs_that_share_an_expert_add_their_gates(mixtral: Module) -> None:
    """V6."""
    module = copy_of(mixtral)
    layer = alias_experts(first_layer(module), [0, 0, 2, 3, 4, 5, 6, -1])
    assert layer.expert_count == 6
    assert layer.stored == (0, 0, 1, 2, 3, 4, 5, -1)
    assert layer.outputs_of(0) == (0, 1)
    rows = torch.randn(200, layer.hidden_size, dtype=torch.float64)
    run = run_layer(layer, module.weights, rows, rows, torch.float64)
    both = (run.stored_ids == 0).all(1)
    assert both.any()
    expert = load_expert(layer, module.weights, 0, torch.float64)
    assert run.y is not None
    assert torch.allclose(run.y[both], run.gates[both].sum(1, keepdim=True) * expert.apply(rows[both]))
    assert (run.stored_ids == -1).any()


def test_protection_follows_the_expert(mixtral: Module) -> None:
    module = copy_of(mixtral)
    layer = protect_experts(first_layer(module), [5])
    layer = slice_experts(layer, [7, 5, 1])
    assert layer.protected == {1}
    assert layer.outputs_of(1) == (1,)
    output(module)


def test_another_router_chooses_other_experts(mixtral: Module) -> None:
    module = copy_of(mixtral)
    layer = first_layer(module)
    weight = torch.randn(layer.outputs, layer.hidden_size)
    layer = replace_router(layer, module.weights, weight)
    rows = torch.randn(5, layer.hidden_size)
    assert torch.allclose(run_layer(layer, module.weights, rows, rows).logits, rows @ weight.T, atol=1e-5)
    with pytest.raises(EditError, match="router weight"):
        replace_router(layer, module.weights, weight[:3])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda layer: slice_experts(layer, [3]), "cannot be kept: k = 2"),
        (lambda layer: slice_experts(layer, [1, 1, 2]), "do not fit a router"),
        (lambda layer: slice_experts(layer, [1, 2, 99]), "do not fit a router"),
        (lambda layer: permute_experts(layer, [0, 1]), "no order"),
        (lambda layer: alias_experts(layer, [-1] * 8), "no stored expert"),
        (lambda layer: alias_experts(layer, [0, 1]), "does not fit"),
    ],
)
def test_impossible_edits_are_refused(mixtral: Module, edit: Callable[[MoeLayer], MoeLayer], message: str) -> None:
    module = copy_of(mixtral)
    with pytest.raises(EditError, match=message):
        edit(first_layer(module))
    assert difference(output(mixtral), output(module)) == 0
