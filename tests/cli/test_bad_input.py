"""Bad input to the commands: one clear line, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import DEMO_MODEL, Command

WEIGHTS = "model.safetensors"


def set_config(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


def cut_weights(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def pointer_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12356672\n")


def pickled_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def index(shard: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        weight_map = {"model.embed_tokens.weight": shard}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return change


@pytest.mark.parametrize(
    ("damage", "code", "text"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), 2, "safetensors"),
        (cut_weights, 6, WEIGHTS),
        (pointer_weights, 6, "LFS"),
        (pickled_weights, 6, "pytorch_model.bin"),
        (index("../outside.safetensors"), 6, "outside.safetensors"),
        (index("/etc/passwd"), 6, "passwd"),
        (index("missing.safetensors"), 6, "missing.safetensors"),
        (set_config(auto_map={"AutoModel": "modeling.Evil"}), 6, "auto_map"),
        (set_config(num_local_experts=16), 3, "experts"),
        (set_config(num_experts_per_tok=9), 3, "experts"),
        (set_config(hidden_size=10**18), 6, "hidden_size"),
        (set_config(model_type="mixtrall"), 3, "mixtral"),
        (lambda folder: (folder / "config.json").write_text("{"), 6, "config.json"),
        (lambda folder: (folder / "config.json").unlink(), 2, "config.json"),
    ],
    ids=[
        "no weights", "cut", "LFS pointer", "pickle", "leaves folder", "absolute", "missing shard", "remote code",
        "too many experts", "top-k too large", "huge", "unknown type", "no JSON", "no config",
    ],
)  # fmt: skip
def test_bad_model_folder(moec: Command, tmp_path: Path, damage: Callable[[Path], None], code: int, text: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(DEMO_MODEL, source)
    damage(source)
    found, out, err = moec("compile", source, "-o", tmp_path / "out")
    assert found == code, err
    assert text in err
    assert out == ""
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--pipeline", "canonicalise"], "canonicalize"),
        (["--pipeline", "dce{speed=1}"], "speed"),
        (["--pipeline", "dce("], "column"),
        (["--target", "ort-gpu"], "ort-cpu"),
        (["--dtype", "float64"], "float16"),
        (["--text", "/no/such/text"], "/no/such/text"),
    ],
)
def test_bad_options(moec: Command, tmp_path: Path, arguments: list[str], text: str) -> None:
    code, _, err = moec("compile", DEMO_MODEL, "-o", tmp_path / "out", *arguments)
    assert code == 2
    assert text in err
    assert list(tmp_path.iterdir()) == []


def test_output_that_exists(moec: Command, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    code, _, err = moec("compile", DEMO_MODEL, "-o", tmp_path / "out")
    assert code == 2
    assert "--force" in err


def test_source_that_is_no_folder(moec: Command, tmp_path: Path) -> None:
    for command in (["compile", tmp_path / "no", "-o", tmp_path / "out"], ["plan", tmp_path / "no"]):
        code, _, err = moec(*command)
        assert code == 2
        assert str(tmp_path / "no") in err
