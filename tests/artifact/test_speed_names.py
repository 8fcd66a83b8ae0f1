"""Names of exports that `moec bench --beside` measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.artifact.speed import export_names
from moec.errors import UsageError


def test_exports_in_folders_of_one_name_are_told_apart() -> None:
    assert export_names([Path("/a/onnx/model.onnx")]) == ["export onnx/model.onnx"]
    paths = [Path("/one/onnx/model.onnx"), Path("/two/onnx/model.onnx")]
    assert export_names(paths) == ["export one/onnx/model.onnx", "export two/onnx/model.onnx"]
    assert export_names([Path("/model.onnx"), Path("/x/model.onnx")]) == ["export /model.onnx", "export x/model.onnx"]
    with pytest.raises(UsageError, match="named twice"):
        export_names([paths[0], Path("/one/onnx/../onnx/model.onnx").resolve()])
