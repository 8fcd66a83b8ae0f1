"""The text is MLIR: mlir-opt reads it, and what it writes reads back to the same module."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from moec.dialects.builtin import ModuleOp
from moec.ir import parse_module, print_operation, structural_difference
from tests.benchmarks.ir import large_module

NAMES = ("mlir-opt", *(f"mlir-opt-{version}" for version in range(22, 17, -1)))
TOOL = next((path for name in NAMES if (path := shutil.which(name))), None)
ALL_OPERATIONS = Path(__file__).with_name("all_operations.mlir")


def modules() -> dict[str, ModuleOp]:
    found = parse_module(ALL_OPERATIONS.read_text(encoding="utf-8"))
    assert isinstance(found, ModuleOp)
    return {"all operations": found, "layers": large_module(60)}


@pytest.mark.skipif(TOOL is None, reason=f"none of {', '.join(NAMES)} is on PATH")
@pytest.mark.parametrize("name", ["all operations", "layers"])
def test_round_trip_through_mlir(name: str) -> None:
    assert TOOL is not None
    module = modules()[name]
    flags = ["--allow-unregistered-dialect", "--mlir-print-op-generic", "--mlir-print-debuginfo"]
    result = subprocess.run(
        [TOOL, *flags, "--mlir-print-local-scope", "-"],
        input=print_operation(module, locations=True),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    again = parse_module(result.stdout)
    assert structural_difference(module, again) is None
    named = [op.location for op in module.walk() if op.location.name]
    assert [op.location for op in again.walk() if op.location.name] == named
