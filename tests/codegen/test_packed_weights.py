"""Packed weights as ONNX: every format, by standard operators and by the operators of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from moec.artifact.options import Activations
from moec.codegen.onnx.emit import MODEL_FILE
from moec.codegen.onnx.targets import Target
from moec.dialects import aten
from moec.ir import DType, TensorType, symbol
from tests.codegen.packed_matrices import FORMATS, ModuleBuilder, linear_module, random_packed
from tests.codegen.running import assert_close, emit_and_run, module_of, operators, reference
from tests.ir.build import f32

ROWS, COLUMNS = 24, 96
# formats that the kernels of ONNX Runtime cannot take
DECODED = ("int4 g8", "ternary extremes", "codebook", "mxfp8", "dictionary")


def _seed(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, name)))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("target", list(Target), ids=lambda target: target.value)
def test_products_equal_the_reference(name: str, target: Target, tmp_path: Path) -> None:
    generator = _seed(name)
    packed = random_packed(FORMATS[name], ROWS, COLUMNS, generator)
    assert packed.problem() is None
    op, weights = linear_module(packed, bias="g32" in name)
    module = module_of(op, weights)
    feeds = {"x": torch.randn((2, 3, COLUMNS), generator=generator)}
    found, report = emit_and_run(module, feeds, tmp_path, target=target)
    assert_close(found["y"], reference(module, feeds)["y"])
    decoded = target is Target.PORTABLE or name.startswith(DECODED)
    assert ("MatMulNBits" in operators(tmp_path)) is not decoded
    assert report.weight_bytes == packed.nbytes + sum(weights[key].nbytes for key in weights if key == "bias")


@pytest.mark.parametrize(
    "name", [name for name in FORMATS if not name.startswith(DECODED) and ("float" not in name or "int4" in name)]
)
def test_int8_activations_are_close(name: str, tmp_path: Path) -> None:
    generator = _seed(name)
    packed = random_packed(FORMATS[name], ROWS, COLUMNS, generator)
    module = module_of(*linear_module(packed))
    feeds = {"x": torch.randn((2, 3, COLUMNS), generator=generator)}
    options = {"target": Target.ORT_CPU, "activations": Activations.INT8}
    found, _ = emit_and_run(module, feeds, tmp_path, **options)
    expected = reference(module, feeds)["y"]
    difference = float(np.abs(found["y"] - expected).max() / np.abs(expected).max())
    assert difference < 2e-2
    if not ("1" in name or "2" in name or "48" in name):
        # the kernel with float activations would give 1e-6
        assert difference > 1e-4


@pytest.mark.parametrize(
    "name", ["int3 row", "int4 g32 zero points", "int5 g32 zero points", "mxfp4", "codebook 4 bits"]
)
def test_the_portable_form_runs_in_the_reference_evaluator(name: str, tmp_path: Path) -> None:
    generator = _seed(name)
    packed = random_packed(FORMATS[name], ROWS, COLUMNS, generator)
    module = module_of(*linear_module(packed))
    feeds = {"x": torch.randn((1, 3, COLUMNS), generator=generator)}
    found, _ = emit_and_run(module, feeds, tmp_path, target=Target.PORTABLE)
    evaluator = ReferenceEvaluator(str(tmp_path / MODEL_FILE))
    by_definition = evaluator.run(None, {name: value.numpy() for name, value in feeds.items()})[0]
    assert_close(by_definition, found["y"])


@pytest.mark.parametrize("numbers", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["int4 g32 zero points", "int4 g16 float zeros", "ternary extremes", "int8 row"])
@pytest.mark.parametrize("target", list(Target), ids=lambda target: target.value)
def test_scales_of_two_bytes(name: str, numbers: torch.dtype, target: Target, tmp_path: Path) -> None:
    generator = _seed(name)
    packed = random_packed(FORMATS[name], ROWS, COLUMNS, generator, numbers)
    module = module_of(*linear_module(packed))
    feeds = {"x": torch.randn((1, 3, COLUMNS), generator=generator)}
    found, report = emit_and_run(module, feeds, tmp_path, target=target)
    assert_close(found["y"], reference(module, feeds)["y"])
    assert report.weight_bytes == packed.nbytes


@pytest.mark.parametrize("columns", [16, 17, 40, 100, 131])
@pytest.mark.parametrize("target", list(Target), ids=lambda target: target.value)
def test_rows_of_any_length(columns: int, target: Target, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(columns)
    for name in ("int2 row", "int3 row", "int4 row", "int7 row", "ternary five per byte", "dictionary of 10 bits"):
        packed = random_packed(FORMATS[name], 5, columns, generator)
        module = module_of(*linear_module(packed))
        feeds = {"x": torch.randn((1, 4, columns), generator=generator)}
        found, _ = emit_and_run(module, feeds, tmp_path / name, target=target)
        assert_close(found["y"], reference(module, feeds)["y"])


@pytest.mark.parametrize(
    ("name", "columns", "gathered"),
    [
        ("int4 row", 64, True),
        ("int4 g32 zero points", 128, True),
        ("int8 g32 zero points", 64, True),
        ("int8 row", 256, True),
        # three zero points of four bits fill no whole bytes, a row of 96 is no power of two
        ("int4 g32 zero points", 96, False),
        ("int4 row", 96, False),
        ("int3 g32 zero points", 64, False),
        ("int4 g8", 64, False),
        ("int4 g16 float zeros", 64, False),
    ],
)
def test_rows_of_a_table_that_is_the_head_too(name: str, columns: int, gathered: bool, tmp_path: Path) -> None:
    packed = random_packed(FORMATS[name], ROWS, columns, _seed(name))
    shape = (symbol("batch"), symbol("seq"))
    builder = ModuleBuilder({"x": TensorType(shape, DType.I64)})
    table = builder.dequant("table", packed)
    ids = {"weight": table, "indices": builder.function.arguments[0]}
    rows = aten.build("embedding.default", ids, (f32(*shape, columns),))
    logits = aten.build("linear.default", {"input": rows.result, "weight": table}, (f32(*shape, ROWS),))
    for op in (rows, logits):
        builder.function.body.append(op)
    module = module_of(builder.finish(logits.result), builder.weights)
    feeds = {"x": torch.randint(0, ROWS, (2, 5), generator=_seed(name))}
    for target in Target:
        found, report = emit_and_run(module, feeds, tmp_path / target.value, target=target)
        assert_close(found["y"], reference(module, feeds)["y"])
        packed_rows = "GatherBlockQuantized" in operators(tmp_path / target.value)
        assert packed_rows is (gathered and target is Target.ORT_CPU)
        assert report.weight_bytes == packed.nbytes
