"""Kernels compiled without a GPU: they compile, fit, do not spill, and need few instructions for a weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moec.codegen.triton.ahead import Compiled, Package, compile_launch
from moec.codegen.triton.architectures import ARCHITECTURES, architecture
from moec.codegen.triton.assembly import read_sass
from moec.codegen.triton.emit import write_package
from moec.codegen.triton.kernel_report import report_kernels
from moec.codegen.triton.metrics import instructions_per_weight, measure
from moec.codegen.triton.prediction import GPUS, Bound, predict
from moec.codegen.triton.spec import Element
from moec.codegen.triton.tiles import Phase
from moec.codegen.triton.tuning import SHIPPED_FORMATS, large_layer
from moec.errors import ResourceError

# instructions of a thread for each weight on sm90, where one slot or few rows have an expert's weights
BARS = {"float": 1.8, "int4": 4.0, "int4 by default": 4.0, "ternary": 4.0, "mixed": 4.0}


def _package(formats: str, folder: Path, element: Element = Element.BFLOAT16) -> Package:
    return write_package([large_layer(SHIPPED_FORMATS[formats], element)], folder)


def _compile(package: Package, target: str, name: str) -> Compiled:
    wanted = architecture(target)
    launch = next(item for item in package.launches(wanted) if item.name == name)
    return compile_launch(launch, wanted, package.element)


@pytest.mark.parametrize(("formats", "kernel"), [("float", "down_tokens"), ("int4 by default", "gate_up_slots")])
def test_few_instructions_for_a_weight(formats: str, kernel: str, tmp_path: Path) -> None:
    compiled = _compile(_package(formats, tmp_path), "sm90", kernel)
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
    compiled = _compile(_package("ternary", tmp_path), "gfx942", "down_tokens")
    metrics = measure(compiled)
    assert compiled.binary[:4] == b"\x7fELF"
    assert metrics.registers > 16 and metrics.products > 0 and metrics.loop > metrics.products
    assert instructions_per_weight(compiled, metrics) is not None


@pytest.mark.slow
@pytest.mark.parametrize("element", [Element.BFLOAT16, Element.FLOAT16, Element.FLOAT32], ids=lambda item: item.value)
@pytest.mark.parametrize("formats", list(SHIPPED_FORMATS))
@pytest.mark.parametrize("target", [item.name for item in ARCHITECTURES])
def test_every_kernel_for_every_architecture(target: str, formats: str, element: Element, tmp_path: Path) -> None:
    """Kernels without weights are the same for all formats."""
    package = _package(formats, tmp_path, element)
    rows = list(report_kernels(package, [architecture(target)], only_products=formats != "float"))
    assert {row.kernel for row in rows} >= {"gate_up_slots", "down_tokens", "gate_up_grouped", "down_grouped"}
    for row in rows:
        assert row.metrics.programs > 0, row
        if target != "sm90":
            continue
        assert row.metrics.spills == 0, row
        if element is not Element.FLOAT32 and row.phase in (Phase.SLOTS.value, Phase.FEW.value) and formats in BARS:
            assert row.instructions is not None and row.instructions <= BARS[formats], row
            # two bits are read faster than the instructions for them are issued
            few_bits = formats in ("ternary", "mixed")
            assert row.prediction is not None and (few_bits or row.prediction.bound is Bound.MEMORY), row


def test_a_kernel_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    package = _package("float", tmp_path)
    small = replace(architecture("sm90"), shared_bytes=1024)
    launch = next(item for item in package.launches(small) if item.name == "gate_up_slots")
    with pytest.raises(ResourceError, match="bytes of shared memory"):
        compile_launch(launch, small, package.element)


def test_prediction_names_the_limit_that_takes_longest() -> None:
    gpu = next(item for item in GPUS if item.architecture == "sm90")
    # 132 SMs with 128 lanes at 1.755 GHz issue 29.7e12 instructions in the second that reads 6.7e12 weights of 4 bits
    assert predict(gpu, Phase.SLOTS, 16, 4.0, 3.6).bound is Bound.MEMORY
    assert predict(gpu, Phase.SLOTS, 16, 4.0, 16.5).bound is Bound.ISSUE
    assert predict(gpu, Phase.SLOTS, 16, 4.0, 16.5).issue == pytest.approx(16.5 / 4.426, rel=1e-3)
    assert predict(gpu, Phase.MANY, 64, 16.0, 2.0).bound is Bound.PRODUCTS
