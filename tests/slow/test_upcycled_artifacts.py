"""Recipes that copy whole blocks or join models: artifacts of both ONNX targets compute what the reference does."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import moec
from moec.artifact.ledger import CheckOutcome
from moec.dialects.moe import RouteOp
from moec.experts import find_moe_layers
from tests.frontend.tiny_models import save_tiny_checkpoint

pytestmark = pytest.mark.slow

EXACT = ("sparse-upcycling", "virtual-groups", "dynamic-dino")
LOSSY = ("drop-upcycling", "mote", "widenet")
JOINING = ("btx", "bam", "bam{attention=soft-experts}", "expert-merging{steps=1 sequences=2}")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    first = save_tiny_checkpoint("llama", folder / "first")
    found = [first]
    for seed in (1, 2):
        other = folder / str(seed)
        shutil.copytree(first, other)
        generator = torch.Generator().manual_seed(seed)
        tensors = load_file(first / "model.safetensors")
        moved = {name: item + 0.05 * torch.randn(item.shape, generator=generator) for name, item in tensors.items()}
        save_file(moved, other / "model.safetensors", metadata={"format": "pt"})
        found.append(other)
    return found


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
@pytest.mark.parametrize("recipe", [*EXACT, *LOSSY, *JOINING])
def test_the_artifact_computes_what_the_reference_does(
    models: list[Path], tmp_path: Path, recipe: str, target: str
) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, 90, (8, 32)))
    result = moec.compile(
        models[0],
        tmp_path / "out",
        others=models[1:] if recipe in JOINING else (),
        recipe=recipe,
        target=target,
        store=tmp_path / "store",
        calibration=ids,
    )
    compared = {row.comparison: row.relative_difference for row in result.report.verification}
    assert all(value <= 1e-4 for value in compared.values())
    assert any("artifact against IR" in name for name in compared)
    assert any("source" in name for name in compared) == (recipe in EXACT)
    entry = next(entry for entry in result.report.ledger if entry.pass_text.startswith(("upcycle", "merge-models")))
    # the copies of widenet are exact, what it then shares is not
    assert (entry.outcome is CheckOutcome.WITHIN_BOUND) == (recipe in (*EXACT, "widenet"))
    if recipe == "sparse-upcycling":
        routers = sum(4 * layer.outputs * layer.hidden_size for layer in find_moe_layers(result.module.op))
        assert entry.after.bytes == entry.before.bytes + routers
    routed = any(isinstance(op, RouteOp) for op in result.module.op.walk())
    assert routed == (not recipe.startswith("expert-merging"))
