"""Offsets and choices at their limits: weights behind the first 2^31 elements of a tensor, an expert chosen twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moec.codegen.triton.emit import emit_triton
from moec.codegen.triton.rendering import PACKAGE_NAME
from moec.codegen.triton.running import Place
from moec.codegen.triton.spec import Element
from moec.dialects.moe import Routing
from tests.codegen.triton_layers import HIDDEN, PLACES, Case, build
from tests.ir.expert_bodies import dense

# 32-bit offsets would wrap around and read in front of the tensor; nothing of the gap is ever touched
PROGRAM = """
import sys, torch
from pathlib import Path
from moec.codegen.triton.interpreter import repair
from moec.codegen.triton.running import import_package
device = sys.argv[2]
if device == "cpu":
    repair()
package = import_package(Path(sys.argv[1]))
block = package.load_layer(0, device)
rows = torch.randn(9, {hidden}, generator=torch.Generator().manual_seed(0)).to(device)
with torch.no_grad():
    expected = [block(rows), block(rows[:1])]
    for name, column in (("input_float", 2), ("output_float", 5)):
        old = getattr(block, name)
        far = torch.empty((1 << 31) + len(old), dtype=old.dtype, device=device)
        far[1 << 31 :] = old
        setattr(block, name, far)
        block.table[:, column] += 1 << 31
    for count, y in zip((9, 1), expected):
        assert torch.equal(block(rows[:count]), y), count
print("equal")
"""

# the same expert in several slots of a token, by its number and by another output, and slots that are empty
DUPLICATES = """
import sys, torch
from pathlib import Path
from moec.codegen.triton.interpreter import repair
from moec.codegen.triton.running import import_package
device = sys.argv[2]
if device == "cpu":
    repair()
package = import_package(Path(sys.argv[1]))
block = package.load_layer(0, device)
kernels, reference = package.blocks.KERNELS[0], package.blocks.REFERENCES[0]
names = package.blocks.weight_names(kernels)
weights = {{name: getattr(block, name) for name in names}}
generator = torch.Generator().manual_seed(0)
for tokens in (1, 9):
    rows = torch.randn(tokens, {hidden}, generator=generator).to(device)
    ids = torch.tensor([[2, 2, 4]], device=device).expand(tokens, 3).contiguous()
    gates = torch.rand(tokens, 3, generator=generator).to(device)
    gates[0, 1] = 0.0
    y = package.blocks.OPERATORS[0][1](rows, ids, gates, list(weights.values()))
    assert (y - reference.experts(rows, ids, gates, weights)).abs().max() < 1e-5, tokens
    once = gates.sum(1, keepdim=True)
    assert (y - reference.experts(rows, ids[:, :1], once, weights)).abs().max() < 1e-5, tokens
print("equal")
"""


def _run(program: str, package: Path, place: Place) -> None:
    interpreted = place is Place.INTERPRETER
    done = subprocess.run(
        [sys.executable, "-c", program.format(hidden=HIDDEN), str(package), "cpu" if interpreted else "cuda"],
        env={**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_an_expert_in_several_slots_of_a_token(place: Place, tmp_path: Path) -> None:
    kinds = [(dense(HIDDEN, 16), (0, 1, 2, 3))]
    case = Case("aliases", kinds, (0, 1, 2, 3, 2), Routing(k=3))
    emit_triton(build([case]), tmp_path, element=Element.FLOAT32)
    _run(DUPLICATES, tmp_path / PACKAGE_NAME, place)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_offsets_beyond_32_bits(place: Place, tmp_path: Path) -> None:
    kinds = [(dense(HIDDEN, 16, name="narrow"), (0, 2)), (dense(HIDDEN, 32, name="wide"), (1, 3))]
    emit_triton(build([Case("ragged", kinds)]), tmp_path, element=Element.FLOAT16)
    _run(PROGRAM, tmp_path / PACKAGE_NAME, place)
