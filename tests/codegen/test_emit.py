"""The files of an ONNX model: bytes, sizes, element types, weights in place, node counts."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import save_file

from moec.artifact.options import OptimizeFor
from moec.codegen.onnx import context
from moec.codegen.onnx.cost_model import ONE_NODE_EXPERTS, Lowering
from moec.codegen.onnx.deploy_files import GENAI_FILE, LOWERING_FILE
from moec.codegen.onnx.emit import DATA_FILE, MODEL_FILE, emit_onnx
from moec.codegen.onnx.targets import Target, parse_target
from moec.dialects import aten
from moec.dialects.builtin import FuncOp, ModuleOp, WeightOp
from moec.errors import UnsupportedModelError, UsageError
from moec.ir import DType, TensorType, symbol
from moec.module import Module, SourceFacts
from moec.weights.checkpoint import Checkpoint
from moec.weights.context import WeightContext
from tests.benchmarks.expert_layers import LayerShape, moe_layers
from tests.codegen.running import assert_close, emit_and_run, load, module_of, reference, run
from tests.ir.build import f32

SHAPE = LayerShape(experts=8, hidden=32, width=24, top_k=2, layers=2)
COUNT = symbol("count")


def _x(tokens: int = 5, hidden: int = SHAPE.hidden) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(2))}


_PROGRAM = """
import sys, torch
from pathlib import Path
from moec.codegen.onnx.emit import emit_onnx
from moec.codegen.onnx.targets import Target
from tests.benchmarks.expert_layers import LayerShape, moe_layers
torch.set_num_threads(int(sys.argv[2]))
shape = LayerShape(8, 32, 24, 2, 2)
for target in Target:
    emit_onnx(moe_layers(shape), Path(sys.argv[1]) / target.value, target=target)
"""


def test_equal_bytes_in_another_process(tmp_path: Path) -> None:
    for seed, threads in (("1", "1"), ("2", "2")):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", _PROGRAM, str(tmp_path / seed), threads]
        subprocess.run(command, check=True, env=environment, timeout=300)
    for target in Target:
        for name in (MODEL_FILE, DATA_FILE):
            first, second = ((tmp_path / seed / target.value / name).read_bytes() for seed in ("1", "2"))
            assert first == second


def test_external_data_is_aligned_and_its_digest_right(tmp_path: Path) -> None:
    report = emit_onnx(moe_layers(SHAPE), tmp_path)
    file = next(file for file in report.files if file.name == DATA_FILE)
    data = (tmp_path / DATA_FILE).read_bytes()
    assert file.nbytes == len(data) and file.sha256 == hashlib.sha256(data).hexdigest()
    model = onnx.load(str(tmp_path / MODEL_FILE), load_external_data=False)
    external = [tensor for tensor in model.graph.initializer if tensor.external_data]
    # the router, and gate, up and down of each expert
    assert len(external) == SHAPE.layers * (1 + 3 * SHAPE.experts)
    for tensor in external:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        # what is smaller than a page shares one
        assert int(entries["offset"]) % (4096 if int(entries["length"]) >= 4096 else 64) == 0
        assert not tensor.raw_data


def test_weights_are_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece is larger than the limit, or than one row; that bounds memory whatever the tensor's size."""
    monkeypatch.setattr(context, "PIECE_BYTES", 4096)
    largest = 0
    original = WeightContext.chunks

    def watched(self: WeightContext, expression: object, limit: int) -> object:
        nonlocal largest
        for piece in original(self, expression, limit):  # type: ignore[arg-type]
            largest = max(largest, piece.nbytes)
            yield piece

    monkeypatch.setattr(WeightContext, "chunks", watched)
    module = moe_layers(LayerShape(experts=16, hidden=64, width=64, top_k=2))
    found, _ = emit_and_run(module, _x(hidden=64), tmp_path, target=Target.ORT_CPU, lowering=Lowering.LEAN)
    assert 0 < largest <= 4096
    assert_close(found["y"], reference(module, _x(hidden=64))["y"])


@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize("lowering", Lowering)
def test_float16_storage(target: Target, lowering: Lowering, tmp_path: Path) -> None:
    if lowering is not Lowering.LEAN and target is Target.PORTABLE:
        pytest.skip("the target has one form")
    # large enough that alignment does not matter
    module = moe_layers(LayerShape(experts=4, hidden=128, width=128, top_k=2))
    x = _x(hidden=128)
    full = emit_onnx(module, tmp_path / "float32", target=target, lowering=lowering)
    found, half = emit_and_run(module, x, tmp_path / "half", dtype=DType.F16, target=target, lowering=lowering)
    assert_close(found["y"], reference(module, x)["y"], 2e-3)
    assert_close(found["y"], run(load(tmp_path / "float32"), x)["y"], 2e-3)
    sizes = [next(file.nbytes for file in report.files if file.name == DATA_FILE) for report in (full, half)]
    assert sizes[1] < 0.6 * sizes[0]


def test_float16_overflow_names_the_weight(tmp_path: Path) -> None:
    module = moe_layers(SHAPE)
    module.weights._in_memory["layers.1.down"][3, 0, 0] = 1e5
    with pytest.raises(UnsupportedModelError, match=r"does not fit float16.*layers\.1\.down\.3"):
        emit_onnx(module, tmp_path, dtype=DType.F16)


def _tied() -> Module:
    """ids -> embedding -> logits by the same weight."""
    ids = TensorType((symbol("batch"), symbol("seq")), DType.I64)
    function = FuncOp.build("main", [ids], arg_names=["input_ids"])
    weight = WeightOp(result_types=[f32(40, 16)], weight_name="embedding", source="embedding")
    shape = (symbol("batch"), symbol("seq"))
    rows = aten.build(
        "embedding.default", {"weight": weight.value, "indices": function.arguments[0]}, (f32(*shape, 16),)
    )
    logits = aten.build("linear.default", {"input": rows.result, "weight": weight.value}, (f32(*shape, 40),))
    for op in (weight, rows, logits):
        function.body.append(op)
    function.finish([logits.result], ["logits"])
    return module_of(ModuleOp.build([function]), {"embedding": torch.randn(40, 16)})


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    module = _tied()
    feeds = {"input_ids": torch.arange(6).reshape(2, 3)}
    found, report = emit_and_run(module, feeds, tmp_path)
    assert_close(found["logits"], reference(module, feeds)["logits"])
    assert next(file.nbytes for file in report.files if file.name == DATA_FILE) == 40 * 16 * 4


@pytest.mark.parametrize("parts", [1, 2], ids=["gate and up together", "gate and up apart"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_weights_in_place(stored: torch.dtype, parts: int, tmp_path: Path) -> None:
    """Per-expert tensors of a checkpoint are read where they are, without a weight written, and cast when loaded."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    source = moe_layers(SHAPE)
    tensors = {}
    for name, tensor in source.weights._in_memory.items():
        if tensor.ndim == 3:
            for expert, matrix in enumerate(tensor):
                for number, part in enumerate(matrix.chunk(parts if "gate_up" in name else 1)):
                    tensors[f"{name}.{expert}.{number}"] = part.to(stored).contiguous()
        else:
            tensors[name] = tensor.to(stored)
    save_file(tensors, checkpoint / "model.safetensors")
    for op in source.main.body:
        if isinstance(op, WeightOp):
            text = f"stack(0, {op.weight_name}.{{0:8}}.0)" if "router" not in op.weight_name else op.weight_name
            if "gate_up" in text and parts == 2:
                text = f"concat(1, {text}, stack(0, {op.weight_name}.{{0:8}}.1))"
            op.source = text if stored is torch.float32 else f"cast({text}, f32)"
    module = Module(source.op, WeightContext(Checkpoint.open(checkpoint)), SourceFacts("module"))
    expected = reference(module, _x())["y"]
    for target in Target:
        folder = tmp_path / target.value
        found, report = emit_and_run(module, _x(), folder, target=target, weights_in_place=True)
        assert_close(found["y"], expected)
        assert not (folder / DATA_FILE).exists()
        assert sum(file.nbytes for file in report.files if file.name == MODEL_FILE) < 100_000
        linked = next(file.name for file in report.files if file.name != MODEL_FILE)
        assert (folder / linked).samefile(checkpoint / "model.safetensors")


def _layer_nodes(experts: int, target: Target, optimize_for: OptimizeFor, folder: Path) -> int:
    shape = LayerShape(experts, hidden=16, width=8, top_k=4)
    report = emit_onnx(moe_layers(shape), folder, target=target, optimize_for=optimize_for)
    assert report.layers[0].experts == experts
    return report.node_count


@pytest.mark.parametrize("optimize_for", OptimizeFor)
def test_node_counts(optimize_for: OptimizeFor, tmp_path: Path) -> None:
    for experts in (8, 64, 160):
        nodes = _layer_nodes(experts, Target.PORTABLE, optimize_for, tmp_path / f"{experts}")
        assert nodes <= 2 * experts + 40
    many = {_layer_nodes(n, Target.ORT_CPU, optimize_for, tmp_path / f"{n}-ort") for n in (ONE_NODE_EXPERTS, 256)}
    assert len(many) == 1 and many.pop() < 40


def test_portable_has_only_standard_operators(tmp_path: Path) -> None:
    emit_onnx(moe_layers(SHAPE), tmp_path)
    model = onnx.load(str(tmp_path / MODEL_FILE), load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)] and model.ir_version == 10
    assert {node.domain for node in model.graph.node} == {""} and not model.functions


def test_lowering_report(tmp_path: Path) -> None:
    emit_onnx(moe_layers(SHAPE), tmp_path, target=Target.ORT_CPU)
    found = json.loads((tmp_path / LOWERING_FILE).read_text())
    assert (found["target"], found["opset"], len(found["layers"])) == ("ort-cpu", 23, SHAPE.layers)
    for layer in found["layers"]:
        assert layer["experts"] == SHAPE.experts and set(layer["predicted_seconds"]) == {"lean", "fused"}
        fastest = min(layer["predicted_seconds"], key=layer["predicted_seconds"].get)
        assert layer["lowering"] == fastest == "fused" and layer["main_graph_nodes"] < 20


def test_targets_are_named() -> None:
    assert parse_target("ort-cpu") is Target.ORT_CPU
    with pytest.raises(UsageError, match="portable, ort-cpu"):
        parse_target("tensorrt")


def test_no_genai_config_without_a_cache(tmp_path: Path) -> None:
    report = emit_onnx(moe_layers(SHAPE), tmp_path)
    assert report.without_genai is not None and "cache" in report.without_genai
    assert not (tmp_path / GENAI_FILE).exists()


def test_genai_config(tmp_path: Path) -> None:
    cache = f32(symbol("batch"), 2, symbol("past"), 8)
    ids = TensorType((symbol("batch"), symbol("seq")), DType.I64)
    names = ["input_ids", "past_key_values.0.key", "past_key_values.0.value"]
    function = FuncOp.build("main", [ids, cache, cache], arg_names=names)
    weight = WeightOp(result_types=[f32(40, 16)], weight_name="w", source="w")
    rows = aten.build(
        "embedding.default",
        {"weight": weight.value, "indices": function.arguments[0]},
        (f32(symbol("batch"), symbol("seq"), 16),),
    )
    function.body.append(weight)
    function.body.append(rows)
    function.finish([rows.result, *function.arguments[1:]], ["logits", "present.0.key", "present.0.value"])
    config = {"eos_token_id": [7, 8], "hidden_size": 16, "num_attention_heads": 4, "max_position_embeddings": 99}
    facts = SourceFacts("decoder", config=config)
    module = Module(ModuleOp.build([function]), WeightContext(in_memory={"w": torch.zeros(40, 16)}), facts)
    assert emit_onnx(module, tmp_path).without_genai is None
    found = json.loads((tmp_path / GENAI_FILE).read_text())
    model, decoder = found["model"], found["model"]["decoder"]
    assert (model["type"], model["vocab_size"], model["context_length"]) == ("decoder", 16, 99)
    assert (model["eos_token_id"], model["pad_token_id"]) == ([7, 8], 7)
    assert (decoder["num_key_value_heads"], decoder["head_size"], decoder["num_hidden_layers"]) == (2, 8, 1)
    assert decoder["inputs"]["past_key_names"] == "past_key_values.%d.key" and "position_ids" not in decoder["inputs"]
    assert found["search"]["past_present_share_buffer"] is False
    cache_names = [value.name for value in onnx.load(str(tmp_path / MODEL_FILE)).graph.output]
    assert cache_names == ["logits", "present.0.key", "present.0.value"]
