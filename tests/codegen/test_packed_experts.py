"""Layers of experts with packed weights as ONNX: every format, and several of them in one layer or one expert."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from moec.codegen.onnx.cost_model import Lowering
from moec.codegen.onnx.emit import MODEL_FILE
from moec.codegen.onnx.targets import Target
from moec.dialects.moe import Routing
from moec.dialects.quant import Integer, Span
from tests.codegen.packed_matrices import FORMATS, expert, experts_module, linear_module, random_packed
from tests.codegen.running import assert_close, emit_and_run, load, module_of, reference, run

HIDDEN, WIDTH, EXPERTS = 64, 96, 5
ROUTING = Routing(k=2)
LAYER_FORMATS = [
    "int2 row",
    "int3 g32 zero points",
    "int4 row",
    "int4 g32 zero points",
    "int6 g16",
    "int8 g16 float zeros",
    "ternary g32",
    "ternary extremes",
    "codebook 3 bits g32",
    "mxfp4",
    "nvfp4",
    "dictionary of 10 bits",
]
ALL = {**FORMATS, "int6 g16": Integer(6, Span.GROUP, 16)}


@pytest.mark.parametrize("name", LAYER_FORMATS)
@pytest.mark.parametrize("target", list(Target), ids=lambda target: target.value)
def test_experts_of_one_format(name: str, target: Target, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(len(name))
    members = [expert([ALL[name]] * 3, HIDDEN, WIDTH, generator, bias="row" in name) for _ in range(EXPERTS)]
    op, weights = experts_module([members], HIDDEN, routing=ROUTING, slots=2)
    module = module_of(op, weights)
    feeds = {"x": torch.randn((9, HIDDEN), generator=generator)}
    found, report = emit_and_run(module, feeds, tmp_path, target=target)
    assert_close(found["y"], reference(module, feeds)["y"])
    for rows in (1, 0):
        few = {"x": feeds["x"][:rows]}
        assert_close(run(load(tmp_path), few)["y"], reference(module, few)["y"])
    assert report.weight_bytes == sum(tensor.nbytes for tensor in weights.values())


@pytest.mark.parametrize("target", list(Target), ids=lambda target: target.value)
def test_a_layer_of_many_formats(target: Target, tmp_path: Path) -> None:
    """Experts of 8, 4, 3 and 2 bits, of a codebook and of a dictionary, and one whose matrices differ."""
    generator = torch.Generator().manual_seed(1)
    kinds = [
        [ALL["int8 tensor"]] * 3,
        [ALL["int4 g32 zero points"]] * 3,
        [ALL["int3 row"]] * 3,
        [ALL["int2 row"]] * 3,
        [ALL["codebook of pairs"]] * 3,
        [ALL["dictionary of 12 bits"]] * 3,
        [ALL["int4 row"], ALL["ternary extremes"], ALL["int8 row"]],
    ]
    classes = [
        [expert(kind, HIDDEN, WIDTH, generator) for _ in range(1 + number % 2)] for number, kind in enumerate(kinds)
    ]
    module = module_of(*experts_module(classes, HIDDEN, routing=Routing(k=3), slots=3))
    for rows in (17, 1):
        feeds = {"x": torch.randn((rows, HIDDEN), generator=generator)}
        found, _ = emit_and_run(module, feeds, tmp_path / str(rows), target=target)
        assert_close(found["y"], reference(module, feeds)["y"])


@pytest.mark.parametrize("name", ["int3 row", "int4 g32 zero points", "mxfp4", "dictionary of 10 bits"])
def test_weights_stay_packed_when_the_runtime_loads_them(name: str, tmp_path: Path) -> None:
    """The trap: a runtime computes what depends on weights alone when it loads a file, and keeps it unpacked."""
    generator = torch.Generator().manual_seed(2)
    members = [expert([ALL[name]] * 3, HIDDEN, WIDTH, generator) for _ in range(EXPERTS)]
    op, weights = experts_module([members], HIDDEN, routing=ROUTING, slots=2)
    feeds = {"x": torch.randn((3, HIDDEN), generator=generator)}
    emit_and_run(module_of(op, weights), feeds, tmp_path / "experts", target=Target.PORTABLE)
    assert _optimised_bytes(tmp_path / "experts") < 1.1 * _stored_bytes(tmp_path / "experts")
    packed = random_packed(ALL[name], 256, 256, generator)
    module = module_of(*linear_module(packed))
    feeds = {"x": torch.randn((1, 1, 256), generator=generator)}
    emit_and_run(module, feeds, tmp_path / "linear", target=Target.PORTABLE)
    assert _optimised_bytes(tmp_path / "linear") < 1.1 * _stored_bytes(tmp_path / "linear")


def _stored_bytes(folder: Path) -> int:
    model = onnx.load(folder / MODEL_FILE)
    return sum(len(item.raw_data) for item in model.graph.initializer)


def _optimised_bytes(folder: Path) -> int:
    """Bytes of the weights that ONNX Runtime holds after its optimiser ran."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(str(folder / MODEL_FILE), options, providers=["CPUExecutionProvider"])
    model = onnx.load(folder / "optimised.onnx")
    return sum(len(onnx.numpy_helper.to_array(item).tobytes()) for item in model.graph.initializer)


def test_many_experts_go_into_a_function(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    for number, name in enumerate(["int4 row", "codebook 4 bits"]):
        members = [expert([ALL[name]] * 3, 32, 32, generator) for _ in range(130)]
        op, weights = experts_module([members], 32, routing=ROUTING, slots=2)
        module = module_of(op, weights)
        feeds = {"x": torch.randn((5, 32), generator=generator)}
        folder = tmp_path / str(number)
        found, report = emit_and_run(module, feeds, folder, target=Target.ORT_CPU)
        assert report.layers[0].choice.lowering is Lowering.LEAN_FUNCTION
        assert_close(found["y"], reference(module, feeds)["y"])
