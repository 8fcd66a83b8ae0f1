"""`moec compile --emit huggingface` from the command line, and `moec verify` of what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Command
from tests.frontend.tiny_models import save_tiny_checkpoint

pytestmark = pytest.mark.xdist_group("checkpoints")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_checkpoint("mixtral", tmp_path_factory.mktemp("source"), num_hidden_layers=1)
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    return folder


def test_both_backends_and_the_tensor_that_somebody_changed(source: Path, tmp_path: Path, moec: Command) -> None:
    out = tmp_path / "out"
    code, printed, errors = moec(
        "compile", source, "-o", out, "--emit", "huggingface,onnx", "--shard-size", "200kB", "--check", "none"
    )
    assert code == 0, errors
    assert "checkpoint in transformers against IR" in printed and "artifact through its cache against IR" in printed
    checkpoint = out / "huggingface"
    manifest = json.loads((out / "moec.json").read_text(encoding="utf-8"))
    assert manifest["build"]["emit"] == ["onnx", "huggingface"] and manifest["build"]["shard_bytes"] == 200_000
    assert {f"huggingface/{path.name}" for path in checkpoint.iterdir()} <= manifest["files"].keys()
    assert (checkpoint / "chat_template.jinja").read_text(encoding="utf-8") == "{{ messages }}"
    card = (checkpoint / "README.md").read_text(encoding="utf-8")
    assert "MixtralForCausalLM.from_pretrained" in card and "the function is the source's" in card
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["checkpoint_bytes"] == sum(path.stat().st_size for path in checkpoint.iterdir())

    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    name = next(name for name in tensors if "experts" in name)
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, shard, metadata={"format": "pt"})
    code, _, errors = moec("verify", out)
    assert code == 4 and name in errors and "SHA-256" in errors


@pytest.mark.slow
def test_a_checkpoint_alone_has_equal_bytes_and_verifies(source: Path, tmp_path: Path, moec: Command) -> None:
    arguments = ("--emit", "huggingface", "--pipeline", "set-routing{k=1}", "--check", "none")
    for name in ("one", "two"):
        code, _, errors = moec("compile", source, "-o", tmp_path / name, *arguments)
        assert code == 0, errors
    assert (tmp_path / "one" / "moec.json").read_bytes() == (tmp_path / "two" / "moec.json").read_bytes()
    assert not (tmp_path / "one" / "onnx").exists()
    card = (tmp_path / "one" / "huggingface" / "README.md").read_text(encoding="utf-8")
    assert "| `num_experts_per_tok` | 2 | 1 |" in card and "Passes: `set-routing{k=1}`" in card
    code, printed, errors = moec("verify", tmp_path / "one")
    assert code == 0 and "checkpoint in transformers against IR" in printed, errors
    code, _, errors = moec("run", tmp_path / "one", "--prompt", "x")
    assert code == 2 and "--emit onnx" in errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--emit", "onnx,gguf"), "no backend 'gguf'"),
        (("--emit", "huggingface", "--shard-size", "60%"), "--shard-size 60% is no size"),
        (("--emit", "huggingface", "--checkpoint-dtype", "int8"), "int8"),
    ],
)
def test_bad_options(arguments: tuple[str, ...], words: str, source: Path, tmp_path: Path, moec: Command) -> None:
    code, _, errors = moec("compile", source, "-o", tmp_path / "out", *arguments)
    assert code == 2 and words in errors
    assert not (tmp_path / "out").exists()
