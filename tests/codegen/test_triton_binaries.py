"""Binaries of kernels for hosts without Python: equal bytes, and a list that says how they are launched."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import triton

from moec.codegen.triton.ahead import Launch, Package
from moec.codegen.triton.architectures import Architecture, parse_architectures
from moec.codegen.triton.binaries import BINARIES_FILE, write_binaries
from moec.codegen.triton.emit import write_package
from moec.codegen.triton.spec import FLOAT
from moec.codegen.triton.tuning import large_layer

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _write(folder: Path, architectures: str) -> list[dict[str, object]]:
    source = folder / "source"
    source.mkdir(parents=True)
    write_binaries(write_package([large_layer((FLOAT,))], source), parse_architectures(architectures), folder / "out")
    rows = json.loads((folder / "out" / BINARIES_FILE).read_text(encoding="utf-8"))
    assert isinstance(rows, list)
    return rows


def _parameters(path: Path) -> int:
    """How many a cubin takes, from its own description."""
    done = subprocess.run([str(TOOL), "-elf", str(path)], capture_output=True, text=True, check=True)
    return done.stdout.count("EIATTR_KPARAM_INFO")


def _check(folder: Path, rows: list[dict[str, object]]) -> None:
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {str(row["file"]) for row in rows} | {BINARIES_FILE} and len(files) == len(rows) + 1
    for row in rows:
        path = folder / str(row["file"])
        data = path.read_bytes()
        assert data[:4] == b"\x7fELF" and str(row["entry"]).encode() in data
        arguments, scratch = row["arguments"], row["scratch_pointers"]
        assert isinstance(arguments, list) and isinstance(scratch, int)
        assert all(re.fullmatch(r"i32|\*(fp32|fp16|bf16|i8|i32|i64)", kind) for _, kind in arguments)
        if path.suffix == ".cubin":
            assert _parameters(path) == len(arguments) + scratch


def test_equal_bytes_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = Package.launches

    def cheap(self: Package, architecture: Architecture) -> Iterator[Launch]:
        return (launch for launch in every(self, architecture) if launch.name in ("combine", "count_slots"))

    monkeypatch.setattr(Package, "launches", cheap)
    written = []
    for name in ("one", "two"):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / f"cache of {name}"))
        rows = _write(tmp_path / name, "sm90,gfx942")
        _check(tmp_path / name / "out", rows)
        written.append({str(row["file"]): (tmp_path / name / "out" / str(row["file"])).read_bytes() for row in rows})
    assert len(written[0]) == 4 and written[0] == written[1]


@pytest.mark.slow
def test_every_kernel_has_a_file(tmp_path: Path) -> None:
    _check(tmp_path / "out", _write(tmp_path, "sm90"))
