"""The weights that an artifact stores are those that the module holds, each once."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import onnx
import pytest
import torch

from moec.artifact.summary import model_size
from moec.codegen.onnx.cost_model import Lowering
from moec.codegen.onnx.emit import DATA_FILE, MODEL_FILE, emit_onnx
from moec.codegen.onnx.external_data import LARGE_PAGE
from moec.codegen.onnx.targets import Target
from moec.dialects.builtin import ModuleOp, WeightOp
from moec.dialects.moe import ExpertsOp, Routing
from moec.experts import (
    Constant,
    Dense,
    Expert,
    FeedForward,
    LowRank,
    MoeLayer,
    Projection,
    alias_experts,
    find_moe_layers,
    load_expert,
    replace_experts,
)
from moec.ir import TensorType, Value, verify
from moec.module import Module
from tests.codegen.running import assert_close, emit_and_run, module_of, reference
from tests.codegen.test_mixed_experts import HIDDEN, LAYERS, build
from tests.experts.models import copy_of, raised_model


def stored_bytes(folder: Path) -> int:
    """Bytes of external data that the file's initialisers name, each range once."""
    ranges = set()
    for tensor in onnx.load(str(folder / MODEL_FILE), load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            ranges.add((int(entries["offset"]), int(entries["length"])))
    ends = sorted(ranges)
    assert all(offset + length <= following for (offset, length), (following, _) in pairwise(ends))
    # the file is the weights and what aligns them
    size = (folder / DATA_FILE).stat().st_size
    total = sum(length for _, length in ranges)
    assert total <= size < total + (len(ranges) + 1) * LARGE_PAGE
    return total


@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize("lowering", [None, Lowering.LEAN, Lowering.FUSED])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_every_kind(name: str, lowering: Lowering | None, target: Target, tmp_path: Path) -> None:
    made = build(name, Routing(k=2))
    module = module_of(made.op, made.weights)
    if lowering is Lowering.FUSED and target is Target.PORTABLE:
        pytest.skip("the target has no fused operator")
    report = emit_onnx(module, tmp_path, target=target, lowering=lowering)
    assert report.weight_bytes == stored_bytes(tmp_path) == model_size(module).bytes


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss", "deepseek_v3"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Module:
    return raised_model(request.param, tmp_path_factory.mktemp(request.param))


def cut(expert: Expert, width: int) -> FeedForward:
    """The first neurons of an expert."""
    assert isinstance(expert, FeedForward) and expert.gate is not None

    def rows(projection: Projection) -> Projection:
        bias = None if projection.bias is None else projection.bias[:width]
        return Projection(Dense(projection.dense()[:width]), bias)

    down = Projection(Dense(expert.down.dense()[:, :width]), expert.down.bias)
    return FeedForward(expert.activation, rows(expert.gate), rows(expert.up), down)


def factored(expert: Expert, base: torch.Tensor) -> FeedForward:
    """The up projection as a base that experts share and a difference of rank 3."""
    assert isinstance(expert, FeedForward)
    u, s, v = torch.linalg.svd(expert.up.dense() - base, full_matrices=False)
    up = Projection(LowRank(u[:, :3] * s[:3], v[:3], base), expert.up.bias)
    return FeedForward(expert.activation, expert.gate, up, expert.down)


def edit(module: Module, layer: MoeLayer) -> MoeLayer:
    """Ragged widths, a constant, factors on a shared base, an alias and a null expert."""
    loaded = {number: load_expert(layer, module.weights, number) for number in range(6)}
    first = loaded[0]
    assert isinstance(first, FeedForward)
    base = first.up.dense() * 0.5
    new: dict[int, Expert] = {
        1: cut(loaded[1], 11),
        2: cut(loaded[2], 5),
        3: Constant(torch.linspace(-1, 1, layer.hidden_size)),
        4: factored(loaded[4], base),
        5: factored(loaded[5], base),
    }
    layer = replace_experts(layer, module.weights, new)
    return alias_experts(layer, [*range(6), 0, -1])


@pytest.mark.parametrize("target", Target)
def test_an_edited_model(source: Module, target: Target, tmp_path: Path) -> None:
    module = copy_of(source)
    before = model_size(module).bytes
    assert emit_onnx(module, tmp_path / "before", target=target).weight_bytes == before
    for layer in find_moe_layers(module.op):
        edit(module, layer)
    verify(module.op)
    report = emit_onnx(module, tmp_path / "after", target=target)
    assert report.weight_bytes == stored_bytes(tmp_path / "after") == model_size(module).bytes < before


def append_copy(module: ModuleOp, reverse: bool) -> None:
    """A second layer behind the first, with the same experts, in the other order if `reverse`."""
    function = module.main
    [first] = [op for op in function.body if isinstance(op, ExpertsOp)]
    route = first.ids.defining_op
    assert route is not None
    logits = route.operands[0].defining_op
    assert logits is not None
    anchor = function.return_op
    mapping: dict[Value, Value] = {logits.operands[0]: first.y, first.x: first.y}
    for value in first.weights:
        op = value.defining_op
        assert isinstance(op, WeightOp) and isinstance(value.type, TensorType)
        count = value.type.static_shape[0]
        rows = ", ".join(f"slice({op.source}, 0, {row}, {row + 1}, 1)" for row in reversed(range(count)))
        source = f"concat(0, {rows})" if reverse else op.source
        again = WeightOp(result_types=[value.type], weight_name=f"again.{op.weight_name}", source=source)
        again.insert_before(anchor)
        mapping[value] = again.value
    for original in (logits, route, first):
        copy = original.clone(mapping)
        copy.insert_before(anchor)
    anchor.set_operand(0, copy.results[0])


@pytest.mark.parametrize("reverse", [False, True], ids=["same order", "another order"])
@pytest.mark.parametrize("lowering", [Lowering.LEAN, Lowering.LEAN_FUNCTION, Lowering.FUSED])
def test_layers_with_the_same_experts(lowering: Lowering, reverse: bool, tmp_path: Path) -> None:
    """Also where the fused operator was asked for, which would store the second order again."""
    made = build("equal", Routing(k=2))
    module = module_of(made.op, made.weights)
    before = model_size(module)
    append_copy(made.op, reverse)
    verify(made.op)
    assert model_size(module).bytes == before.bytes
    assert model_size(module).active_flops == 2 * before.active_flops
    feeds = {"x": torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(0))}
    found, report = emit_and_run(module, feeds, tmp_path, target=Target.ORT_CPU, lowering=lowering)
    assert report.weight_bytes == stored_bytes(tmp_path) == before.bytes
    assert_close(found["y"], reference(module, feeds)["y"])
