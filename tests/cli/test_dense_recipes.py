"""Every recipe for dense models by command line, in both ONNX targets: compiled, compared, and verified afterwards."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moec.frontend.model_kind import ModelKind
from moec.pipeline.recipes import Recipe, recipes
from tests.cli.conftest import Command
from tests.frontend.tiny_models import VOCABULARY_SIZE, save_tiny_checkpoint

pytestmark = pytest.mark.slow

SMALL = {"sequences": 96, "length": 32, "epochs": 1, "steps": 1}
JOINING = ("btx", "bam", "expert-merging")
RECIPES = [recipe for recipe in recipes() if recipe.model is not ModelKind.MOE]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A tiny llama and two models like it with other weights."""
    folder = tmp_path_factory.mktemp("models")
    found = [save_tiny_checkpoint("llama", folder / "first")]
    for seed in (1, 2):
        other = Path(shutil.copytree(found[0], folder / str(seed)))
        generator = torch.Generator().manual_seed(seed)
        file = other / "model.safetensors"
        moved = {
            name: old + 0.05 * torch.randn(old.shape, generator=generator) for name, old in load_file(file).items()
        }
        save_file(moved, file, metadata={"format": "pt"})
        found.append(other)
    return found


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_it_becomes_an_artifact_that_verifies(
    models: list[Path], tmp_path: Path, moec: Command, recipe: Recipe, target: str
) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, VOCABULARY_SIZE, (96, 32)))
    settings = " ".join(f"{name}={value}" for name, value in SMALL.items() if name in recipe.parameters)
    others = [word for other in models[1:] for word in ("--with", other)] if recipe.name in JOINING else []
    store = ("--store", tmp_path / "store")
    code, output, error = moec(
        "compile", models[0], *others, "-o", tmp_path / "out", "--recipe", f"{recipe.name}{{{settings}}}",
        "--target", target, "--calibration", ids, *store,
    )  # fmt: skip
    assert code == 0, error
    code, output, error = moec("verify", tmp_path / "out", *store)
    assert code == 0 and "artifact against IR" in output, error
