"""Kernels compiled without a GPU: they compile, fit, do not spill, and need few instructions for a weight."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moec.codegen.triton.ahead import Compiled, Package, compile_launch, write_binaries
from moec.codegen.triton.architectures import ARCHITECTURES, architecture
from moec.codegen.triton.assembly import read_sass
from moec.codegen.triton.emit import LAYERS_FILE, TILES_FILE
from moec.codegen.triton.kernel_report import report_kernels
from moec.codegen.triton.metrics import instructions_per_weight, measure
from moec.codegen.triton.prediction import GPUS, Bound, predict
from moec.codegen.triton.reading import read_layer
from moec.codegen.triton.rendering import render_package
from moec.codegen.triton.spec import FLOAT, Element, LayerKind, MatrixFormat
from moec.codegen.triton.tiles import Phase, tile_table
from moec.dialects.moe import Routing
from moec.errors import ResourceError
from moec.experts import find_moe_layers
from tests.codegen.triton_layers import Case, build

INT4, TERNARY = MatrixFormat(4, 8, 128), MatrixFormat(2, 1)
DEFAULT_INT4 = MatrixFormat(4, 8, 32, zero_points=True)
"""What `quantize{bits=4}` makes."""
FORMATS: dict[str, tuple[MatrixFormat, ...]] = {
    "float": (FLOAT,),
    "int4": (INT4,),
    "int4 by default": (DEFAULT_INT4,),
    "ternary": (TERNARY,),
    "mixed": (TERNARY, INT4),
}
# instructions of a thread for each weight on sm90, where one slot or few rows have an expert's weights
BARS = {"float": 1.8, "int4": 4.0, "int4 by default": 4.0, "ternary": 4.0, "mixed": 4.0}


def _kind(name: str, element: Element = Element.BFLOAT16) -> LayerKind:
    """64 experts of DeepSeek-V2-Lite's sizes (hidden 2048, width 1408, 6 of 64), as specification alone."""
    module = build([Case("small")])
    small = read_layer(find_moe_layers(module.op)[0], module.weights, element).kind
    formats = FORMATS[name]
    width = 1408 if len(formats) == 1 else 0
    return replace(
        small,
        hidden_size=2048,
        outputs=64,
        experts=64,
        top_k=6,
        routing=Routing(k=6),
        width=width,
        largest_width=1408,
        input_formats=formats,
        output_formats=formats,
    )


def _package(kind: LayerKind, folder: Path) -> Package:
    for name, text in render_package([kind]).items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / TILES_FILE).write_text(json.dumps(tile_table([kind])), encoding="utf-8")
    (folder / LAYERS_FILE).write_text(
        json.dumps({"element": kind.element.value, "kinds": 1, "layers": []}), encoding="utf-8"
    )
    return Package.open(folder)


def _compile(package: Package, target: str, name: str) -> Compiled:
    wanted = architecture(target)
    launch = next(item for item in package.launches(wanted) if item.name == name)
    return compile_launch(launch, wanted, package.element)


@pytest.mark.parametrize(("formats", "kernel"), [("float", "down_tokens"), ("int4 by default", "gate_up_slots")])
def test_few_instructions_for_a_weight(formats: str, kernel: str, tmp_path: Path) -> None:
    compiled = _compile(_package(_kind(formats), tmp_path), "sm90", kernel)
    metrics = measure(compiled)
    assert metrics.spills == 0
    per_weight = instructions_per_weight(compiled, metrics)
    assert per_weight is not None and 0.5 < per_weight <= BARS[formats]


def test_sums_of_rows_are_no_products_with_weights() -> None:
    """Two products, one with registers of a constant that was moved: only the other multiplies weights."""
    text = """
        /*0010*/                   IMAD.MOV.U32 R4, RZ, RZ, 0x3f803f80 ;
        /*0020*/                   MOV R5, R4 ;
        /*0030*/                   IMAD.MOV.U32 R6, RZ, RZ, R4 ;
        /*0040*/                   IMAD.MOV.U32 R7, RZ, RZ, R4 ;
.L_x_0:
        /*0050*/                   LDS.128 R8, [R20] ;
        /*0060*/                   HMMA.16816.F32.BF16 R12, R4, R16, RZ ;
        /*0070*/                   HMMA.16816.F32.BF16 R12, R8, R16, R12 ;
        /*0080*/              @!P0 BRA `(.L_x_0) ;
    """
    loop = read_sass(text).loop()
    assert [item.multiplied for item in loop] == [0, 0, 16 * 8 * 16, 0]
    assert sum(item.is_product for item in loop) == 2


def test_amd_binaries_are_taken_apart(tmp_path: Path) -> None:
    compiled = _compile(_package(_kind("ternary"), tmp_path), "gfx942", "down_tokens")
    metrics = measure(compiled)
    assert compiled.binary[:4] == b"\x7fELF"
    assert metrics.registers > 16 and metrics.products > 0 and metrics.loop > metrics.products
    assert instructions_per_weight(compiled, metrics) is not None


@pytest.mark.slow
@pytest.mark.parametrize("element", [Element.BFLOAT16, Element.FLOAT16, Element.FLOAT32], ids=lambda item: item.value)
@pytest.mark.parametrize("formats", list(FORMATS))
def test_every_kernel_for_every_architecture(formats: str, element: Element, tmp_path: Path) -> None:
    package = _package(_kind(formats, element), tmp_path)
    rows = list(report_kernels(package, ARCHITECTURES))
    assert {row.architecture for row in rows} == {item.name for item in ARCHITECTURES}
    assert {row.kernel for row in rows} >= {"route", "gate_up_slots", "down_tokens", "gate_up_grouped", "combine"}
    for row in rows:
        assert row.metrics.programs > 0, row
        if row.architecture != "sm90":
            continue
        assert row.metrics.spills == 0, row
        if element is not Element.FLOAT32 and row.phase in (Phase.SLOTS.value, Phase.FEW.value):
            assert row.instructions is not None and row.instructions <= BARS[formats], row
            # two bits are read faster than the instructions for them are issued
            few_bits = formats in ("ternary", "mixed")
            assert row.prediction is not None and (few_bits or row.prediction.bound is Bound.MEMORY), row


def test_a_kernel_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    package = _package(_kind("float"), tmp_path)
    small = replace(architecture("sm90"), shared_bytes=1024)
    launch = next(item for item in package.launches(small) if item.name == "gate_up_slots")
    with pytest.raises(ResourceError, match="bytes of shared memory"):
        compile_launch(launch, small, package.element)


def test_tiles_fit_every_architecture() -> None:
    table = tile_table([_kind(name) for name in FORMATS])
    assert set(table) == {"default", "interpreter", *(item.name for item in ARCHITECTURES)}
    for entries in table.values():
        assert len(entries) == len(FORMATS) * len(Phase) * 2


def test_prediction_names_the_limit_that_takes_longest() -> None:
    gpu = next(item for item in GPUS if item.architecture == "sm90")
    # 132 SMs with 128 lanes at 1.755 GHz issue 29.7e12 instructions in the second that reads 6.7e12 weights of 4 bits
    assert predict(gpu, Phase.SLOTS, 16, 4.0, 3.6).bound is Bound.MEMORY
    assert predict(gpu, Phase.SLOTS, 16, 4.0, 16.5).bound is Bound.ISSUE
    assert predict(gpu, Phase.SLOTS, 16, 4.0, 16.5).issue == pytest.approx(16.5 / 4.426, rel=1e-3)
    assert predict(gpu, Phase.MANY, 64, 16.0, 2.0).bound is Bound.PRODUCTS


@pytest.mark.slow
def test_binaries_beside_the_source(tmp_path: Path) -> None:
    package = _package(_kind("float"), tmp_path)
    folder = tmp_path / "binaries"
    write_binaries(package, [architecture("sm90")], folder)
    listed = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))
    assert len({row["file"] for row in listed}) == len(listed)
    for row in listed:
        assert (folder / row["file"]).read_bytes()[:4] == b"\x7fELF"
