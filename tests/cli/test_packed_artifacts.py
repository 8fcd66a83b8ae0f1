"""Artifacts with packed weights, from the command line: what the ledger, the manifest and the verification say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import moec
from moec.artifact.manifest import Manifest, read_manifest
from moec.artifact.recheck import verify_folder
from tests.cli.conftest import DEMO_MODEL

ALL_IN_FOUR_BITS = "quantize{what=all}"


@pytest.mark.slow
def test_int8_activations_are_in_manifest_and_ledger(tmp_path: Path) -> None:
    out = tmp_path / "out"
    moec.compile(
        DEMO_MODEL, out, pipeline=ALL_IN_FOUR_BITS, target="ort-cpu", activations="int8", check="none", store=tmp_path
    )
    manifest = read_manifest(out)
    assert manifest.build.activations == "int8"
    assert manifest.verification.tolerance == 2e-2
    last = manifest.ledger[-1]
    assert last.pass_text == "emit{activations=int8}"
    # with the tokens behind a tie of a router, which the verification leaves out
    assert 1e-4 < last.layer_errors[0].relative_error < 0.1
    assert last.loss_change is not None
    assert abs(last.loss_change) < 0.05
    forms = {layer["lowering"] for layer in json.loads((out / "onnx/lowering.json").read_text())["layers"]}
    assert forms == {"fused-packed"}
    assert all(row.relative_difference <= row.bound == 2e-2 for row in verify_folder(out, store=tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_packed_artifacts_equal_their_ir(target: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = moec.compile(DEMO_MODEL, out, pipeline=ALL_IN_FOUR_BITS, target=target, check="none", store=tmp_path)
    manifest: Manifest = result.manifest
    assert manifest.build.activations == "float32"
    assert not any(entry.pass_text.startswith("emit") for entry in manifest.ledger)
    assert all(row.relative_difference <= 1e-5 for row in verify_folder(out, store=tmp_path))
    # 4 bits, and scales and zero points of groups of 32: 5.125 bits, where float32 takes 32
    assert manifest.ledger[-1].after.bytes < 0.17 * manifest.ledger[0].before.bytes
