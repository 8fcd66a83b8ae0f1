"""`moec verify` finds what was changed behind its back, and names the layer and the tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

from moec.artifact.manifest import describe_files, read_manifest, write_manifest
from tests.cli.conftest import DEMO_MODEL, Command

pytestmark = pytest.mark.xdist_group("artifact")


def renew_digests(artifact: Path) -> None:
    """Makes the manifest vouch for the changed files, so that only the numbers can tell."""
    manifest = read_manifest(artifact)
    write_manifest(artifact, manifest.model_copy(update={"files": describe_files(artifact)}))


def matrix_in_data(artifact: Path, contains: str) -> tuple[str, np.memmap[tuple[int, ...], np.dtype[np.float32]]]:
    """The first external matrix whose name contains `contains`, open for writing."""
    model = onnx.load(str(artifact / "onnx" / "model.onnx"), load_external_data=False)
    for tensor in model.graph.initializer:
        if contains in tensor.name and tensor.external_data:
            entries = {item.key: item.value for item in tensor.external_data}
            path = artifact / "onnx" / entries["location"]
            shape = tuple(tensor.dims)
            return tensor.name, np.memmap(path, np.float32, "r+", int(entries["offset"]), shape)
    raise AssertionError(f"no external tensor {contains}")


@pytest.mark.parametrize("digests", ["old digests", "new digests"])
def test_one_byte_flipped(moec: Command, artifact: Path, digests: str) -> None:
    name, matrix = matrix_in_data(artifact, "layers.2.self_attn.o_proj")
    matrix.view(np.uint8).reshape(-1)[1027] ^= 0x40
    matrix.flush()
    if digests == "new digests":
        renew_digests(artifact)
    code, _, err = moec("verify", artifact)
    assert code == 4
    assert name in err
    assert "model.layers.2" in err
    assert ("model.onnx.data" in err or "SHA-256" in err) == (digests == "old digests")


def test_two_router_rows_swapped(moec: Command, artifact: Path) -> None:
    name, matrix = matrix_in_data(artifact, "layers.1.mlp.gate")
    axis = matrix.shape.index(8)
    swapped = np.array(matrix).take([1, 0, *range(2, 8)], axis)
    matrix[...] = swapped
    matrix.flush()
    renew_digests(artifact)
    code, _, err = moec("verify", artifact)
    assert code == 4
    assert name in err
    assert "model.layers.1" in err


def mutated_source(folder: Path, change: Callable[[dict[str, object]], None]) -> Path:
    source = folder / "mutated"
    shutil.copytree(DEMO_MODEL, source)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def swap_experts(tensors: dict[str, object]) -> None:
    prefix = "model.layers.0.block_sparse_moe.experts"
    for part in ("w1", "w2", "w3"):
        first, second = f"{prefix}.2.{part}.weight", f"{prefix}.5.{part}.weight"
        tensors[first], tensors[second] = tensors[second], tensors[first]


def drop_norm(tensors: dict[str, object]) -> None:
    name = "model.layers.3.post_attention_layernorm.weight"
    tensors[name] = tensors[name] * 0 + 1  # type: ignore[operator]


@pytest.mark.parametrize(
    ("change", "layer", "tensor"),
    [(swap_experts, "model.layers.0", "experts"), (drop_norm, "model.layers.3", "post_attention_layernorm")],
    ids=["experts swapped", "norm dropped"],
)
def test_artifact_of_another_checkpoint(
    moec: Command, artifact: Path, tmp_path: Path, change: Callable[[dict[str, object]], None], layer: str, tensor: str
) -> None:
    code, _, err = moec("verify", artifact, "--against", mutated_source(tmp_path, change))
    assert code == 4
    assert layer in err
    assert tensor in err
    assert "model.safetensors differs" in err


def test_renormalisation_flipped_in_the_ir(moec: Command, artifact: Path) -> None:
    path = artifact / "module.mlir"
    text = path.read_text()
    assert "softmax_selected" in text
    path.write_text(text.replace("softmax_selected", "score", 1))
    renew_digests(artifact)
    code, _, err = moec("verify", artifact)
    assert code == 4
    assert "model.layers.0" in err


def test_ir_that_is_no_ir(moec: Command, artifact: Path) -> None:
    (artifact / "module.mlir").write_text('"builtin.module"() ({')
    renew_digests(artifact)
    code, _, err = moec("verify", artifact)
    assert code == 2
    assert "module.mlir" in err


def test_graph_that_is_cut(moec: Command, artifact: Path) -> None:
    path = artifact / "onnx" / "model.onnx"
    path.write_bytes(path.read_bytes()[:5000])
    code, _, err = moec("verify", artifact)
    assert code == 4
    assert "model.onnx" in err


def test_source_that_is_gone(moec: Command, artifact: Path) -> None:
    measurements = json.loads((artifact / "measurements.json").read_text())
    measurements["source"] = str(artifact / "nowhere")
    (artifact / "measurements.json").write_text(json.dumps(measurements))
    code, _, err = moec("verify", artifact)
    assert code == 2
    assert "--against" in err and "--files-only" in err
    assert "all files are as the manifest lists them, and nothing else was compared" in err
    code, out, _ = moec("verify", artifact, "--files-only")
    assert code == 0
    assert "files are as the manifest lists them" in out and "not compared" in out
    assert json.loads(moec("verify", artifact, "--files-only", "--json")[1])["files"] == len(
        read_manifest(artifact).files
    )
    assert moec("verify", artifact, "--files-only", "--against", artifact)[0] == 2
    _, matrix = matrix_in_data(artifact, "layers.2.self_attn.o_proj")
    matrix.view(np.uint8).reshape(-1)[1027] ^= 0x40
    matrix.flush()
    for arguments in ([], ["--files-only"]):
        code, _, err = moec("verify", artifact, *arguments)
        assert code == 4
        assert "model.onnx.data" in err
