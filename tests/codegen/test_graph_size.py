"""Graphs of layers whose codes are stored in another width or order than the operator's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch

from moec.artifact.options import Activations
from moec.codegen.onnx.cost_model import Lowering
from moec.codegen.onnx.emit import MODEL_FILE, emit_onnx
from moec.codegen.onnx.targets import Target
from moec.dialects.moe import Routing
from moec.module import Module
from tests.codegen.packed_matrices import FORMATS, expert, experts_module
from tests.codegen.running import assert_close, emit_and_run, load, module_of, operators, reference, run

HIDDEN, WIDTH = 32, 64
DIRECT = "int4 g32 zero points"
# nodes of a product, all of which compute with rows
REARRANGED = {
    "int2 row": 1,
    "int3 g32 zero points": 1,
    "int4 g16 float zeros": 8,
    "int8 g32 zero points": 4,
    "ternary five per byte": 1,
    "nvfp4": 4,
}


def _layer(name: str, experts: int) -> tuple[Module, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(experts)
    members = [expert([FORMATS[name]] * 3, HIDDEN, WIDTH, generator) for _ in range(experts)]
    module = module_of(*experts_module([members], HIDDEN, routing=Routing(k=2)))
    return module, {"x": torch.randn((7, HIDDEN), generator=generator)}


@dataclass(frozen=True)
class Growth:
    """What eight more experts add to a file."""

    nodes: int
    main_nodes: int
    bytes: int


def _growth(name: str, folder: Path, target: Target) -> Growth:
    sizes = []
    for experts in (4, 12):
        place = folder / str(experts)
        report = emit_onnx(_layer(name, experts)[0], place, target=target, lowering=Lowering.LEAN)
        sizes.append((operators(place).total(), report.node_count, (place / MODEL_FILE).stat().st_size))
    return Growth(*[more - few for few, more in zip(*sizes, strict=True)])


@pytest.mark.parametrize("name", REARRANGED)
def test_experts_are_rearranged_together(name: str, tmp_path: Path) -> None:
    growth = _growth(name, tmp_path / "rearranged", Target.ORT_CPU)
    direct = _growth(DIRECT, tmp_path / "direct", Target.ORT_CPU)
    assert growth.main_nodes == 0 and direct.main_nodes == direct.nodes == 24
    assert growth.nodes <= 24 * REARRANGED[name]
    assert growth.bytes <= 2 * direct.bytes


@pytest.mark.parametrize("name", REARRANGED)
def test_the_portable_form_decodes_in_one_place(name: str, tmp_path: Path) -> None:
    growth = _growth(name, tmp_path, Target.PORTABLE)
    assert growth.nodes == 0
    # numbers with more digits, and the table of experts' places
    assert growth.bytes < 128


@pytest.mark.parametrize("name", REARRANGED)
def test_the_runtime_folds_what_rearranges(name: str, tmp_path: Path) -> None:
    """Behind the optimiser codes are constants of the operator, and both targets compute the same."""
    module, feeds = _layer(name, 3)
    results = [emit_and_run(module, feeds, tmp_path / target.value, target=target)[0]["y"] for target in Target]
    assert_close(results[0], results[1])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimised" / MODEL_FILE)
    (tmp_path / "optimised").mkdir()
    path = tmp_path / Target.ORT_CPU.value / MODEL_FILE
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    left = operators(tmp_path / "optimised")
    # eight bits, and twice the numbers of E2M1, are two products of four
    assert left["MatMulNBits"] == 9 * (2 if name in ("int8 g32 zero points", "nvfp4") else 1)
    assert not {"BitShift", "BitwiseAnd", "BitwiseOr", "Pad", "Expand", "Cast", "Transpose"} & set(left)


@pytest.mark.parametrize("activations", list(Activations), ids=lambda value: value.value)
def test_calls_inside_the_function_of_a_layer(activations: Activations, tmp_path: Path) -> None:
    module, feeds = _layer("int3 g32 zero points", 9)
    options = {"target": Target.ORT_CPU, "activations": activations, "lowering": Lowering.LEAN_FUNCTION}
    found, report = emit_and_run(module, feeds, tmp_path / "one", **options)
    assert_close(found["y"], reference(module, feeds)["y"], 1e-5 if activations is Activations.FLOAT32 else 2e-2)
    is_float = activations is Activations.FLOAT32
    assert (report.int8_products, report.float_products) == ((0, 27) if is_float else (27, 0))
    path = tmp_path / "one" / MODEL_FILE
    onnx.checker.check_model(str(path))
    emit_onnx(module, tmp_path / "again", **options)
    assert path.read_bytes() == (tmp_path / "again" / MODEL_FILE).read_bytes()
    inlined = onnx.inliner.inline_local_functions(onnx.load(path))
    assert {node.domain for node in inlined.graph.node} == {"", "com.microsoft"}
    onnx.save(inlined, path)
    assert (run(load(tmp_path / "one"), feeds)["y"] == found["y"]).all()
