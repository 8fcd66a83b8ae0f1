"""Equal inputs give equal bytes, whatever the folder, hash seed and number of threads; killed runs leave nothing."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moec.artifact.opened import Artifact
from tests.cli.conftest import DEMO_MODEL

pytestmark = pytest.mark.xdist_group("artifact")


def compile_process(source: Path, out: Path, **environment: str) -> subprocess.Popen[str]:
    """A run that heeds interrupts, even where the tests run in the background and inherited that they are ignored."""
    command = [sys.executable, "-m", "moec", "compile", str(source), "-o", str(out)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for_folder(process: subprocess.Popen[str], parent: Path) -> None:
    """Returns when the run has begun to write."""
    for _ in range(1200):
        if list(parent.glob(".out.moec-unfinished-*")):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    pytest.fail("the run never began to write")


@pytest.mark.slow
def test_a_killed_run_changes_nothing_and_the_next_gives_equal_bytes(compiled: Path, tmp_path: Path) -> None:
    source = tmp_path / "elsewhere"
    shutil.copytree(DEMO_MODEL, source)
    out = tmp_path / "out"
    with compile_process(source, out, PYTHONHASHSEED="1", OMP_NUM_THREADS="1") as process:
        wait_for_folder(process, tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    assert list(tmp_path.glob(".out.moec-unfinished-*"))
    with compile_process(source, out, PYTHONHASHSEED="2", OMP_NUM_THREADS="2") as process:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert (out / "moec.json").read_bytes() == (compiled / "moec.json").read_bytes()
    assert (out / "module.mlir").read_bytes() == (compiled / "module.mlir").read_bytes()
    measured = Artifact.open(out).measurements
    assert measured.actual.memory_bytes == pytest.approx(measured.predicted.memory_bytes, rel=0.25)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with compile_process(DEMO_MODEL, tmp_path / "out") as process:
        wait_for_folder(process, tmp_path)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_written_are_reported(tmp_path: Path) -> None:
    """The limit on the size of a file stands for a full disk, which not every user can make."""
    command = [sys.executable, "-m", "moec", "compile", str(DEMO_MODEL), "-o", str(tmp_path / "out"), "--check=none"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20)),
    )
    assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
mount -t tmpfs -o size=6m tmpfs "$1" || exit 77
"$2" -m moec compile "$3" -o "$1/out" --check none
code=$?
ls -A "$1"
exit $code
"""


@pytest.mark.slow
def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    """A file system of 6 MiB for an artifact of 12, in a name space of its own."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    command = ["unshare", "--map-root-user", "--mount", "bash", "-c", FULL_DISK, "bash", str(tmp_path)]
    done = subprocess.run([*command, sys.executable, str(DEMO_MODEL)], capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("this user may not mount a file system in a name space of its own")
    assert done.returncode == 5, done.stderr
    assert "No space left on device" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
