"""The manifest vouches for every file of an artifact, and what is stored is what is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moec.artifact.folder import MANIFEST_NAME
from moec.artifact.manifest import (
    BuildRecord,
    FileRecord,
    Manifest,
    SourceRecord,
    VerificationRecord,
    check_files,
    describe_files,
    read_manifest,
    write_manifest,
)
from moec.errors import MoecError, UnsafeInputError, UsageError, VerificationError
from tests.artifact.samples import sample_report


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An artifact folder with three files, one of them a measurement."""
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"graph")
    (tmp_path / "onnx" / "model.onnx.data").write_bytes(bytes(1000))
    (tmp_path / "measurements.json").write_text("{}")
    write_manifest(tmp_path, manifest(describe_files(tmp_path)))
    return tmp_path


def manifest(files: dict[str, FileRecord]) -> Manifest:
    return Manifest(
        source=SourceRecord(model_type="mixtral", architecture="MixtralForCausalLM", parameters=12, files=files),
        build=BuildRecord(
            pipeline="raise-nn",
            emit=("onnx",),
            target="portable",
            dtype="float32",
            optimize_for="decode",
            check="changed",
            seed=0,
            weights_in_place=False,
        ),
        versions={"moec": "0.1.0"},
        ledger=sample_report().ledger,
        verification=VerificationRecord(status="passed", tokens=512, tolerance=1e-4),
        files=files,
    )


def test_reading_gives_what_was_written(artifact: Path) -> None:
    stored = read_manifest(artifact)
    assert stored == manifest(describe_files(artifact))
    assert set(stored.files) == {"onnx/model.onnx", "onnx/model.onnx.data"}
    assert json.loads((artifact / MANIFEST_NAME).read_text())["schema"] == "moec.artifact/1"
    check_files(artifact, stored)


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / "onnx" / "model.onnx.data").read_bytes())
    data[517] ^= 1
    (folder / "onnx" / "model.onnx.data").write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (flip_a_byte, "model.onnx.data"),
        (lambda folder: (folder / "onnx" / "model.onnx").write_bytes(b"grap"), "4 bytes instead of 5"),
        (lambda folder: (folder / "onnx" / "model.onnx").unlink(), "missing"),
        (lambda folder: (folder / "onnx" / "extra.py").write_text(""), "extra.py"),
    ],
    ids=["byte flipped", "cut", "removed", "added"],
)
def test_damage_is_named(artifact: Path, damage: Callable[[Path], object], named: str) -> None:
    damage(artifact)
    with pytest.raises(VerificationError, match=named) as caught:
        check_files(artifact, read_manifest(artifact))
    assert caught.value.exit_code == 4


def test_measurements_are_outside_of_the_digest(artifact: Path) -> None:
    (artifact / "measurements.json").write_text('{"seconds": 3}')
    (artifact / "report.html").write_text("<!doctype html>")
    check_files(artifact, read_manifest(artifact))


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "a/../../b", "a\\b"])
def test_paths_that_leave_the_folder_are_refused(artifact: Path, name: str) -> None:
    text = (artifact / MANIFEST_NAME).read_text()
    (artifact / MANIFEST_NAME).write_text(text.replace('"onnx/model.onnx"', json.dumps(name)))
    with pytest.raises(UnsafeInputError, match="outside of its folder"):
        read_manifest(artifact)


@pytest.mark.parametrize(
    ("text", "error"),
    [("{", UnsafeInputError), ("[]", UnsafeInputError), ('{"schema": "other/1"}', UnsafeInputError)],
)
def test_malformed_manifest(artifact: Path, text: str, error: type[MoecError]) -> None:
    (artifact / MANIFEST_NAME).write_text(text)
    with pytest.raises(error, match="malformed"):
        read_manifest(artifact)


def test_a_folder_that_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not an artifact"):
        read_manifest(tmp_path)
