"""Packed experts: written, read back and computed as they are, and kept packed by every edit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moec.artifact.summary import model_size
from moec.dialects.builtin import WeightOp
from moec.dialects.quant import Codebook, Integer, Span, Ternary, ZeroPoint
from moec.experts import (
    Dense,
    FeedForward,
    Matrix,
    MoeLayer,
    Projection,
    Quantized,
    alias_experts,
    find_moe_layers,
    load_expert,
    permute_experts,
    replace_experts,
    slice_experts,
)
from moec.ir import DType, TensorType, parse_module, print_operation
from moec.module import Module
from moec.quantization.rounding import Target, round_matrix
from tests.experts.models import copy_of, difference, output, raised_model

TARGETS = {
    "int4": Target(Integer(4, Span.GROUP, 16, ZeroPoint.INTEGER)),
    "int3": Target(Integer(3)),
    "trits": Target(Ternary()),
    "table": Target(Codebook(4)),
}


@pytest.fixture(scope="module", params=("mixtral", "gpt_oss"))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Module:
    """gpt_oss has biases in all projections and gates and ups that alternate."""
    return raised_model(request.param, tmp_path_factory.mktemp(request.param))


def packed(expert: FeedForward, target: Target) -> FeedForward:
    def change(projection: Projection) -> Projection:
        return replace(projection, matrix=Quantized(round_matrix(target, projection.dense())))

    gate = None if expert.gate is None else change(expert.gate)
    return replace(expert, gate=gate, up=change(expert.up), down=change(expert.down))


def feed_forward(layer: MoeLayer, module: Module, number: int) -> FeedForward:
    found = load_expert(layer, module.weights, number)
    assert isinstance(found, FeedForward)
    return found


def packed_layer(module: Module, names: list[str]) -> MoeLayer:
    """The first layer with expert i packed as `names[i]` says; empty for as it was."""
    layer = find_moe_layers(module.op)[0]
    new = {
        number: packed(feed_forward(layer, module, number), TARGETS[name]) for number, name in enumerate(names) if name
    }
    return replace_experts(layer, module.weights, new)


def matrices(expert: FeedForward) -> list[Matrix]:
    return [item.matrix for item in (expert.gate, expert.up, expert.down) if item is not None]


def dense_twin(layer: MoeLayer, module: Module) -> None:
    """Replaces packed experts by what they stand for."""
    new = {}
    for number in range(layer.expert_count):
        expert = feed_forward(layer, module, number)
        gate = None if expert.gate is None else replace(expert.gate, matrix=_dense(expert.gate))
        new[number] = replace(
            expert,
            gate=gate,
            up=replace(expert.up, matrix=_dense(expert.up)),
            down=replace(expert.down, matrix=_dense(expert.down)),
        )
    replace_experts(layer, module.weights, new)


def _dense(projection: Projection) -> Matrix:
    return Dense(projection.dense())


@pytest.mark.parametrize("name", list(TARGETS))
def test_they_are_read_back_as_they_were_written(source: Module, name: str) -> None:
    module = copy_of(source)
    first = find_moe_layers(module.op)[0]
    before = [packed(feed_forward(first, module, number), TARGETS[name]) for number in range(first.expert_count)]
    layer = packed_layer(module, [name] * first.expert_count)
    assert len(layer.experts.classes) == 1
    for number, expert in enumerate(before):
        found = feed_forward(layer, module, number)
        for one, other in zip(matrices(expert), matrices(found), strict=True):
            assert isinstance(one, Quantized) and isinstance(other, Quantized)
            assert one.packed.format == other.packed.format
            assert one.packed.tensors().keys() == other.packed.tensors().keys()
            for part, tensor in one.packed.tensors().items():
                assert torch.equal(tensor, other.packed.tensors()[part])
    codes = [value for value in layer.experts.weights if isinstance(value.type, TensorType) and value.type.rank == 3]
    assert any(value.type.dtype is DType.U8 for value in codes if isinstance(value.type, TensorType))
    text = print_operation(module.op)
    assert print_operation(parse_module(text)) == text


def test_the_layer_computes_what_packed_matrices_stand_for(source: Module) -> None:
    module = copy_of(source)
    layer = packed_layer(module, ["int4", "", "trits", "table"] * 2)
    # one class for each kind of body: packed experts of one format, and those that stay
    assert len(layer.experts.classes) == 4
    found = output(module)
    twin = copy_of(module)
    dense_twin(find_moe_layers(twin.op)[0], twin)
    # the twin is stored in float32
    assert difference(found, output(twin)) < 1e-6
    assert difference(found, output(module, torch.float32).double()) < 1e-4


def test_edits_keep_packed_stacks(source: Module) -> None:
    module = copy_of(source)
    layer = packed_layer(module, ["int4", "int4", "int3", "int4", *["int4"] * 4])
    wanted = output(module)
    order = [2, 0, 3, 1, 7, 6, 5, 4]
    moved = copy_of(module)
    layer = permute_experts(find_moe_layers(moved.op)[0], order)
    assert difference(wanted, output(moved)) < 1e-12
    layer = slice_experts(layer, [0, 1, 3])
    layer = alias_experts(layer, [0, 1, 0])
    for number in range(layer.expert_count):
        assert all(isinstance(matrix, Quantized) for matrix in matrices(feed_forward(layer, moved, number)))
    stored = {op.source for op in module.op.walk() if isinstance(op, WeightOp) and op.value.type.dtype is DType.U8}  # type: ignore[attr-defined]
    digests = {word for source in stored for word in source.split('"') if len(word) == 64}
    for op in moved.op.walk():
        if isinstance(op, WeightOp) and op.value.uses and op.value.type.dtype is DType.U8:  # type: ignore[attr-defined]
            assert {word for word in op.source.split('"') if len(word) == 64} <= digests


def test_replacing_one_keeps_the_others_as_stored(source: Module) -> None:
    module = copy_of(source)
    layer = packed_layer(module, ["int4"] * 8)
    other = packed(feed_forward(layer, module, 2), TARGETS["int3"])
    layer = replace_experts(layer, module.weights, {2: other})
    formats = [matrices(feed_forward(layer, module, number))[0] for number in range(8)]
    bits = [item.packed.format.bits for item in formats if isinstance(item, Quantized)]  # type: ignore[attr-defined]
    assert bits == [4, 4, 3, 4, 4, 4, 4, 4]
    assert sorted(len(group.experts) for group in layer.experts.classes) == [1, 7]


def test_bytes_are_those_of_codes_and_scales(source: Module) -> None:
    before = model_size(source)
    module = copy_of(source)
    layer = packed_layer(module, ["int4"] * 8)
    after = model_size(module)
    dense = stored = 0
    for number in range(8):
        for matrix in matrices(feed_forward(layer, module, number)):
            assert isinstance(matrix, Quantized)
            rows, columns = matrix.shape
            dense += rows * columns
            groups = columns // 16
            stored += rows * columns // 2 + rows * groups * 4 + rows * -(-groups // 2)
    itemsize = module.weights.shape_dtype(_first_source(source))[1].itemsize
    assert after.bytes == before.bytes - dense * itemsize + stored
    assert after.parameters == before.parameters
    assert after.active_flops == before.active_flops


def _first_source(module: Module) -> str:
    weight = find_moe_layers(module.op)[0].experts.weights[0].defining_op
    assert isinstance(weight, WeightOp)
    return weight.source
