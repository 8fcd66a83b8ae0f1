"""`moec verify` finds damage that still loads and runs, and names the layer and the tensor.

Mutations of the demo's artifact are in `tests/cli/test_mutations.py`; this model has biases and a shared expert.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moec.artifact.compilation import compile_folder
from moec.artifact.options import Check, CompileOptions
from moec.cli.main import main
from tests.frontend.tiny_models import save_tiny_checkpoint
from tests.parity.mutations import ArtifactEditor

pytestmark = pytest.mark.xdist_group("mutations")

LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint and its artifact; a model with biases, a router and a shared expert."""
    root = tmp_path_factory.mktemp("mutations")
    save_tiny_checkpoint("qwen2_moe", root / "checkpoint")
    compile_folder(root / "checkpoint", root / "artifact", CompileOptions(check=Check.NONE, verify=False))
    return root


@pytest.fixture
def artifact(original: Path, tmp_path: Path) -> ArtifactEditor:
    return ArtifactEditor(Path(shutil.copytree(original / "artifact", tmp_path / "artifact")))


def verify(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """Exit code and error text of `moec verify`."""
    with pytest.raises(SystemExit) as caught:
        main(["verify", str(folder), *options])
    return int(caught.value.code or 0), capsys.readouterr().err


def drop_a_bias(artifact: ArtifactEditor) -> None:
    name = f"{LAYER}.self_attn.q_proj.bias"
    artifact.write(name, np.zeros_like(artifact.read(name)))


def swap_two_experts(artifact: ArtifactEditor) -> None:
    """A lowering may cut a matrix into parts, so that an expert has tensors `<stack>[.<rows>].<expert>`."""
    stored = [name for name in artifact.names() if name.startswith(f"{LAYER}.mlp.experts.") and name.endswith(".2")]
    assert len(stored) >= 2
    for name in stored:
        artifact.swap(name, name.removesuffix(".2") + ".5")


MUTATIONS = [
    pytest.param(drop_a_bias, "self_attn.q_proj.bias", id="bias dropped"),
    pytest.param(swap_two_experts, "mlp.experts.gate_up_proj", id="experts swapped"),
]


@pytest.mark.parametrize(("mutate", "tensor"), MUTATIONS)
def test_numbers_tell(
    artifact: ArtifactEditor,
    original: Path,
    capsys: pytest.CaptureFixture[str],
    mutate: Callable[[ArtifactEditor], None],
    tensor: str,
) -> None:
    mutate(artifact)
    artifact.sign_again()
    code, error = verify(artifact.folder, capsys, "--against", str(original / "checkpoint"))
    assert code == 4
    assert f"{LAYER}.{tensor}" in error
    assert "largest difference" in error


def test_renormalisation_flipped_in_the_source(
    artifact: ArtifactEditor, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(original / "checkpoint", tmp_path / "checkpoint"))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["norm_topk_prob"] = not config["norm_topk_prob"]
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    code, error = verify(artifact.folder, capsys, "--against", str(source))
    assert code == 4
    assert "model.layers.0" in error
    assert "mlp" in error
