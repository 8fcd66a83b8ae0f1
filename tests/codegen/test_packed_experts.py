"""Layers of experts with packed weights as ONNX: every format, and several of them in one layer or one expert."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from moec.artifact.options import Activations
from moec.codegen.onnx.cost_model import Lowering
from moec.codegen.onnx.emit import MODEL_FILE
from moec.codegen.onnx.targets import Target
from moec.dialects.moe import Routing, Score, Select
from moec.dialects.quant import Integer, Levels, Span, Ternary, TritPacking, ZeroPoint
from moec.experts import Dense, FeedForward, Offset, Quantized
from tests.codegen.packed_matrices import FORMATS, expert, experts_module, linear_module, random_packed
from tests.codegen.running import assert_close, emit_and_run, load, module_of, reference, run

HIDDEN, WIDTH, EXPERTS = 64, 96, 5
ROUTING = Routing(k=2)
LAYER_FORMATS = [
    "int2 row",
    "int3 g32 zero points",
    "int3 tensor zero points",
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
    op, weights = experts_module([members], HIDDEN, routing=ROUTING)
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
    module = module_of(*experts_module(classes, HIDDEN, routing=Routing(k=3)))
    for rows in (17, 1):
        feeds = {"x": torch.randn((rows, HIDDEN), generator=generator)}
        found, _ = emit_and_run(module, feeds, tmp_path / str(rows), target=target)
        assert_close(found["y"], reference(module, feeds)["y"])


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *((name, Target.PORTABLE) for name in ("int3 row", "int4 g32 zero points", "mxfp4", "dictionary of 10 bits")),
        *((name, Target.ORT_CPU) for name in ("int4 g32 zero points", "ternary extremes", "dictionary of 10 bits")),
    ],
)
def test_weights_stay_packed_when_the_runtime_loads_them(name: str, target: Target, tmp_path: Path) -> None:
    """The trap: a runtime computes what depends on weights alone when it loads a file, and keeps it unpacked."""
    generator = torch.Generator().manual_seed(2)
    members = [expert([ALL[name]] * 3, HIDDEN, WIDTH, generator) for _ in range(EXPERTS)]
    op, weights = experts_module([members], HIDDEN, routing=ROUTING)
    feeds = {"x": torch.randn((3, HIDDEN), generator=generator)}
    emit_and_run(module_of(op, weights), feeds, tmp_path / "experts", target=target)
    assert _optimised_bytes(tmp_path / "experts") < 1.1 * _stored_bytes(tmp_path / "experts")
    packed = random_packed(ALL[name], 256, 256, generator)
    module = module_of(*linear_module(packed))
    feeds = {"x": torch.randn((1, 1, 256), generator=generator)}
    emit_and_run(module, feeds, tmp_path / "linear", target=target)
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
        op, weights = experts_module([members], 32, routing=ROUTING)
        module = module_of(op, weights)
        feeds = {"x": torch.randn((5, 32), generator=generator)}
        folder = tmp_path / str(number)
        found, report = emit_and_run(module, feeds, folder, target=Target.ORT_CPU)
        assert report.layers[0].choice.lowering is Lowering.LEAN_FUNCTION
        assert_close(found["y"], reference(module, feeds)["y"])


QMOE_FORMATS = {
    "int4 g32": Integer(4, Span.GROUP, 32),
    "int4 g16 zero points": Integer(4, Span.GROUP, 16, ZeroPoint.INTEGER),
    "int8 g32": Integer(8, Span.GROUP, 32),
    "int2 g32": Integer(2, Span.GROUP, 32),
}


@pytest.mark.parametrize("activations", list(Activations), ids=lambda value: value.value)
@pytest.mark.parametrize("name", QMOE_FORMATS)
def test_the_fused_operator_weighs_experts_by_the_gates(name: str, activations: Activations, tmp_path: Path) -> None:
    """Gates that are no softmax of the chosen ones: sigmoid scores, not normalised, with empty slots."""
    kind = QMOE_FORMATS[name]
    generator = torch.Generator().manual_seed(4)
    members = [expert([kind] * 3, HIDDEN, WIDTH, generator, bias="zero" in name) for _ in range(EXPERTS)]
    routing = Routing(score=Score.SIGMOID, select=Select.THRESHOLD, p=0.5, k_max=3, scale=1.7)
    module = module_of(*experts_module([members], HIDDEN, routing=routing))
    feeds = {"x": torch.randn((9, HIDDEN), generator=generator)}
    options = {"target": Target.ORT_CPU, "activations": activations}
    found, report = emit_and_run(module, feeds, tmp_path, lowering=Lowering.FUSED, **options)
    exact = activations is Activations.FLOAT32
    if exact and kind.bits != 4:
        assert report.layers[0].choice.lowering is Lowering.LEAN
        assert "float32 activations" in report.layers[0].choice.reason
    else:
        assert report.layers[0].choice.lowering is Lowering.FUSED_PACKED
        assert report.layers[0].nodes < 12
    assert_close(found["y"], reference(module, feeds)["y"], 1e-5 if exact else 2e-2)


def test_what_the_fused_operator_gets_wrong_never_reaches_it(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    blocks = Integer(4, Span.GROUP, 32)
    refused = {
        "mixed widths": ([blocks, blocks, Integer(8, Span.GROUP, 32)], ROUTING, "one format"),
        "rows": ([Integer(4)] * 3, ROUTING, "blocks"),
        "blocks of 48": ([Integer(4, Span.GROUP, 48)] * 3, ROUTING, "blocks"),
        "raw logits": ([blocks] * 3, Routing(k=2, score=Score.IDENTITY), "negative"),
    }
    for name, (formats, routing, reason) in refused.items():
        hidden = 96 if "48" in name else HIDDEN
        members = [expert(formats, hidden, WIDTH, generator) for _ in range(EXPERTS)]
        module = module_of(*experts_module([members], hidden, routing=routing))
        feeds = {"x": torch.randn((4, hidden), generator=generator)}
        options = {"target": Target.ORT_CPU, "lowering": Lowering.FUSED}
        found, report = emit_and_run(module, feeds, tmp_path / name, **options)
        assert reason in report.layers[0].choice.reason
        assert_close(found["y"], reference(module, feeds)["y"])


@pytest.mark.parametrize(("signs", "base"), [("five", None), ("dictionary of 10 bits", "int8 g16 float zeros")])
@pytest.mark.parametrize("target", list(Target), ids=lambda target: target.value)
def test_a_base_and_what_experts_add(target: Target, signs: str, base: str | None, tmp_path: Path) -> None:
    """The base is stored once, as it is or packed, with a bias of each expert."""
    generator = torch.Generator().manual_seed(3)
    kind = Ternary(Levels.SCALE, Span.TENSOR, packing=TritPacking.FIVE_PER_BYTE)
    own = kind if signs == "five" else ALL[signs]
    members = [expert([own] * 3, HIDDEN, WIDTH, generator, bias=True) for _ in range(EXPERTS)]
    sides = ("gate", "up", "down")
    shapes = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    bases = [
        Dense(torch.randn(shape, generator=generator) / 8)
        if base is None
        else Quantized(random_packed(ALL[base], *shape, generator))
        for shape in shapes
    ]

    def based(member: FeedForward) -> FeedForward:
        found = {}
        for side, shared in zip(sides, bases, strict=True):
            old = getattr(member, side)
            found[side] = replace(old, matrix=Offset(shared, old.matrix))
        return replace(member, **found)

    op, weights = experts_module([[based(member) for member in members]], HIDDEN, routing=ROUTING)
    module = module_of(op, weights)
    feeds = {"x": torch.randn((9, HIDDEN), generator=generator)}
    found, report = emit_and_run(module, feeds, tmp_path, target=target)
    assert_close(found["y"], reference(module, feeds)["y"])
    assert report.weight_bytes == sum(tensor.nbytes for tensor in weights.values())
