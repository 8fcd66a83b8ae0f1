"""`--emit triton`, `moec verify` and `moec kernels` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import DEMO_MODEL, Command


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [(), ("--dtype", "bfloat16", "--pipeline", "quantize{bits=4 symmetric=true group=row}")]
)
def test_kernels_of_the_demo_model(options: tuple[str, ...], tmp_path: Path, moec: Command) -> None:
    out = tmp_path / "out"
    emitted = ("--emit", "triton", "--architectures", "sm90")
    code, printed, error = moec("compile", DEMO_MODEL, "-o", out, *emitted, "--store", tmp_path / "store", *options)
    assert code == 0, error
    manifest = json.loads((out / "moec.json").read_text(encoding="utf-8"))
    assert manifest["build"]["architectures"] == ["sm90"] and "triton" in manifest["versions"]
    listed = json.loads((out / "triton" / "binaries" / "kernels.json").read_text(encoding="utf-8"))
    assert listed and all(f"triton/binaries/{row['file']}" in manifest["files"] for row in listed)
    assert "kernels for many tokens in the interpreter against IR" in printed
    code, printed, error = moec("verify", out, "--store", tmp_path / "store")
    assert code == 0 and "kernels for one token" in printed, error
    code, printed, error = moec("kernels", out, "--architectures", "sm90", "--json")
    assert code == 0, error
    rows = json.loads(printed)
    assert {row["kernel"] for row in rows} >= {"route", "gate_up_slots", "down_tokens"}
    assert all(row["metrics"]["spills"] == 0 for row in rows)


def test_refusals(artifact: Path, tmp_path: Path, moec: Command) -> None:
    code, _, error = moec("kernels", artifact)
    assert code == 2 and "holds no kernels" in error and "--emit triton" in error
    code, _, error = moec("kernels", artifact, "--architectures", "sm42")
    assert code == 2 and "no architecture 'sm42'" in error
    code, _, error = moec("compile", DEMO_MODEL, "-o", tmp_path / "out", "--emit", "triton", "--architectures", "sm42")
    assert code == 2 and "no architecture 'sm42'" in error
    code, _, error = moec("compile", DEMO_MODEL, "-o", tmp_path / "out", "--architectures", "sm90")
    assert code == 2 and "no kernels are emitted" in error and "--emit triton" in error
    assert not (tmp_path / "out").exists()
    code, _, error = moec("compile", DEMO_MODEL, "-o", tmp_path / "out", "--dtype", "bfloat16")
    assert code == 2 and "no bfloat16" in error
