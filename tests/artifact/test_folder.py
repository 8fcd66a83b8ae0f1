"""The output folder is there whole or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moec.artifact.folder import MANIFEST_NAME, atomic_folder
from moec.errors import UsageError

KILLED = """
import sys
from pathlib import Path
from moec.artifact.folder import atomic_folder
with atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("written")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").mkdir()
        (folder / "a" / "b").write_text("text")
        assert not (tmp_path / "out").exists()
        assert folder.parent == tmp_path
    assert (tmp_path / "out" / "a" / "b").read_text() == "text"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), ValueError("bug")])
def test_nothing_is_left_when_the_block_raises(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), atomic_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("written")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists already") as caught, atomic_folder(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert caught.value.exit_code == 2
    assert str(tmp_path / "out") in str(caught.value)


def test_missing_parent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"), atomic_folder(tmp_path / "no" / "out"):
        pytest.fail("the block must not run")


def test_force_replaces_an_artifact(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / MANIFEST_NAME).write_text("{}")
    (out / "old").write_text("old")
    with atomic_folder(out, replace=True) as folder:
        (folder / "new").write_text("new")
        assert (out / "old").exists()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_keeps_the_old_artifact_when_the_run_fails(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / MANIFEST_NAME).write_text("{}")
    with pytest.raises(ValueError, match="bug"), atomic_folder(out, replace=True):
        raise ValueError("bug")
    assert (out / MANIFEST_NAME).read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_force_never_removes_what_is_not_an_artifact(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    other = tmp_path / "other"
    other.mkdir()
    (other / MANIFEST_NAME).write_text("{}")
    if kind == "folder":
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
    elif kind == "file":
        out.write_text("years of work")
    else:
        out.symlink_to(other)
    with pytest.raises(UsageError, match="--force replaces only"), atomic_folder(out, replace=True):
        pytest.fail("the block must not run")
    assert out.exists()


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        stale = Path(process.stdout.readline().strip())
        with atomic_folder(tmp_path / "other"):
            assert stale.exists(), "another destination's folder is none of our business"
        with pytest.raises(ValueError, match="stop"), atomic_folder(tmp_path / "out"):
            assert stale.exists(), "its process is alive"
            raise ValueError("stop")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (stale / "half").exists()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]
