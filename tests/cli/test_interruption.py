"""A request to end a run is heeded wherever it arrives: also where Python has nobody to raise it to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moec import interruption
from moec.artifact import folder as folder_module
from moec.artifact.folder import MANIFEST_NAME, atomic_folder

COMMAND = """
import os, signal, sys, typer, weakref
from pathlib import Path
from moec import interruption
from moec.artifact.folder import atomic_folder
from moec.cli import main as command_line

def interrupt(reference=None):
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):  # Python calls the handler between two of its steps
        pass

class Subject:
    pass

class Ending:
    def __del__(self):
        interrupt()

app = typer.Typer()
@app.command()
def work() -> None:
    with atomic_folder(Path({out!r})) as folder:
        (folder / 'file').write_text('half')
{lines}
        (folder / 'file').write_text('whole')
        print('went on')
command_line.app = app
signal.signal(signal.SIGINT, signal.default_int_handler)
command_line.main([])
"""

PLACES = {
    "destructor": ("ending = Ending()", "del ending"),
    "weak reference": ("subject = Subject()", "reference = weakref.ref(subject, interrupt)", "del subject"),
    "bare except": ("try:", "    interrupt()", "except BaseException:", "    pass"),
    "another error": ("try:", "    interrupt()", "except BaseException:", "    raise ValueError('failed') from None"),
    "plain": ("interrupt()",),
}
HEARD_AT_ONCE = ("another error", "plain")


@pytest.mark.parametrize("place", PLACES)
def test_no_place_swallows_it(place: str, tmp_path: Path) -> None:
    lines = "\n".join(f"        {line}" for line in PLACES[place])
    script = COMMAND.format(out=str(tmp_path / "out"), lines=lines)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "moec: interrupted; nothing half-written was left\n")
    assert done.stdout == ("" if place in HEARD_AT_ONCE else "went on\n")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def watched() -> Iterator[None]:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    with interruption.watched():
        yield
    signal.signal(signal.SIGINT, previous)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass


@pytest.mark.usefixtures("watched")
def test_an_artifact_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two renames of a replacement neither the old nor the new artifact has its name."""
    out = tmp_path / "out"

    def write(text: str) -> None:
        with atomic_folder(out, replace=True) as folder:
            (folder / MANIFEST_NAME).write_text(json.dumps(text))

    write("old")
    rename = Path.replace

    def rename_and_interrupt(path: Path, target: Path) -> Path:
        result = rename(path, target)
        interrupt()
        return result

    monkeypatch.setattr(folder_module.Path, "replace", rename_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        write("new")
    assert interruption.requested()
    assert json.loads((out / MANIFEST_NAME).read_text()) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("watched")
def test_a_second_request_does_not_stop_the_clean_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = folder_module.shutil.rmtree

    def interrupt_and_remove(path: Path, ignore_errors: bool = False) -> None:
        interrupt()
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(folder_module.shutil, "rmtree", interrupt_and_remove)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("half")
        interrupt()
    assert list(tmp_path.iterdir()) == []


def test_ignored_stays_ignored() -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruption.watched():
            interrupt()
            assert not interruption.requested()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)
