"""A checkpoint of 8 GiB compiles in far less memory than it has bytes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from moec.artifact.report import read_report
from moec.codegen.onnx.emit import DATA_FILE
from tests.slow.memory import run_moec
from tests.slow.synthetic_checkpoint import CheckpointSize, write_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("memory")]

BOUND = 2.5 * 2**30
SIZE = CheckpointSize()
IN_PLACE = "--weights-in-place"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The checkpoint, deleted afterwards; skips where the disk has no room for it and its largest artifact."""
    root = tmp_path_factory.mktemp("large")
    free = shutil.disk_usage(root).free
    if free < 30 * 2**30:
        pytest.skip(f"needs 30 GiB of disk, {free / 2**30:.0f} are free")
    folder = root / "checkpoint"
    assert write_checkpoint(folder, SIZE) > 8 * 2**30
    yield folder
    shutil.rmtree(root)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--target", "portable"], id="portable"),
        pytest.param(["--target", "ort-cpu"], id="ort-cpu"),
        pytest.param(["--target", "portable", "--dtype", "float16"], id="float16"),
        pytest.param(["--target", "portable", IN_PLACE], id="in place"),
    ],
)
def test_compiling_needs_little_memory(checkpoint: Path, options: list[str], tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    run = run_moec(["compile", str(checkpoint), "-o", str(output), *options], tmp_path / "log.txt")
    try:
        assert run.exit_code == 0, run.output
        print(f"{' '.join(options)}: {run.seconds:.0f} s, {run.peak_bytes / 2**30:.2f} GiB\n{run.output}")
        size = sum(path.stat().st_size for path in (output / "onnx").iterdir())
        assert size > 8 * 2**30
        assert run.peak_bytes < BOUND
        assert (output / "onnx" / DATA_FILE).exists() == (IN_PLACE not in options)
        gates = [layer.parity is not None for layer in read_report(output).lowerings]
        assert gates == ["ort-cpu" in options] * SIZE.layers
    finally:
        shutil.rmtree(output, ignore_errors=True)
