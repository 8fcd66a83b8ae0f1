"""Weights behind the first 2^31 elements of a tensor are read where they lie."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moec.codegen.triton.emit import emit_triton
from moec.codegen.triton.rendering import PACKAGE_NAME
from moec.codegen.triton.spec import Element
from tests.codegen.triton_layers import HIDDEN, Case, build
from tests.ir.expert_bodies import dense

# 32-bit offsets would wrap around and read in front of the tensor; nothing of the gap is ever touched
PROGRAM = """
import sys, torch
from pathlib import Path
from moec.codegen.triton.interpreter import repair
from moec.codegen.triton.running import import_package
repair()
package = import_package(Path(sys.argv[1]))
block = package.load_layer(0)
rows = torch.randn(9, {hidden}, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    expected = [block(rows), block(rows[:1])]
    for name, column in (("input_float", 2), ("output_float", 5)):
        old = getattr(block, name)
        far = torch.empty((1 << 31) + len(old), dtype=old.dtype)
        far[1 << 31 :] = old
        setattr(block, name, far)
        block.table[:, column] += 1 << 31
    for count, y in zip((9, 1), expected):
        assert torch.equal(block(rows[:count]), y), count
print("equal")
"""


@pytest.mark.slow
def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    kinds = [(dense(HIDDEN, 16, name="narrow"), (0, 2)), (dense(HIDDEN, 32, name="wide"), (1, 3))]
    emit_triton(build([Case("ragged", kinds)]), tmp_path, element=Element.FLOAT16)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(hidden=HIDDEN), str(tmp_path / PACKAGE_NAME)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr
