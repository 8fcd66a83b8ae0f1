"""The output folder of a command: it appears under its name when it is whole, and not at all otherwise."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moec import interruption
from moec.errors import UsageError

MANIFEST_NAME = "moec.json"
_MARK = ".moec-unfinished-"


@contextmanager
def atomic_folder(destination: Path, *, replace: bool = False) -> Iterator[Path]:
    """Gives a temporary sibling of `destination` to write into; renames it to `destination` when the block ends well.

    Every file is flushed to the disk before the rename. When the block raises (an interrupt included) the temporary
    folder is removed; what a killed process left behind is removed by the next run with the same destination.
    `replace` allows an existing `destination` to be replaced if it is an artifact of moec or an empty folder.

    Raises UsageError if `destination` exists and may not be replaced, or if its parent is not a folder.
    """
    destination = Path(os.path.abspath(destination))
    parent = destination.parent
    _require_free(destination, replace)
    if not parent.is_dir():
        raise UsageError("the folder to write into does not exist", where=str(parent), hint="create it first")
    temporary: Path | None = None
    try:
        with _locked(parent):
            _remove_stale(destination)
            with interruption.held():
                temporary = Path(tempfile.mkdtemp(prefix=_prefix(destination), dir=parent))
                lock = os.open(temporary, os.O_RDONLY)
                fcntl.flock(lock, fcntl.LOCK_EX)
        # mkdtemp makes a private folder; the result gets the permissions that any new folder of this user gets.
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        _flush(temporary)
        with _locked(parent):
            interruption.heed()
            with interruption.held():
                _require_free(destination, replace)
                _move_into_place(temporary, destination)
        _flush_folder(parent)
    finally:
        if temporary is not None:
            with interruption.held():
                # After the rename there is nothing of this name left; after a failure there is.
                shutil.rmtree(temporary, ignore_errors=True)
                os.close(lock)


def _require_free(destination: Path, replace: bool) -> None:
    if not os.path.lexists(destination):
        return
    if not replace:
        raise UsageError(
            "the output folder exists already",
            where=str(destination),
            hint="choose another folder with -o, or give --force to replace the artifact in it",
        )
    is_folder = destination.is_dir() and not destination.is_symlink()
    if not is_folder or not ((destination / MANIFEST_NAME).is_file() or next(destination.iterdir(), None) is None):
        raise UsageError(
            "--force replaces only artifacts of moec and empty folders, and this is neither",
            where=str(destination),
            hint="remove it yourself, or choose another folder with -o",
        )


def _move_into_place(temporary: Path, destination: Path) -> None:
    if os.path.lexists(destination):
        old = Path(tempfile.mkdtemp(prefix=_prefix(destination), dir=destination.parent))
        destination.replace(old)
        temporary.replace(destination)
        shutil.rmtree(old)
    else:
        temporary.replace(destination)


def _prefix(destination: Path) -> str:
    return f".{destination.name}{_MARK}"


def _remove_stale(destination: Path) -> None:
    """Removes the temporary folders of `destination` whose process has ended: a dead process holds no lock."""
    for path in destination.parent.glob(f"{glob.escape(_prefix(destination))}*"):
        if path.is_symlink() or not path.is_dir():
            continue
        folder = os.open(path, os.O_RDONLY)
        try:
            with suppress(BlockingIOError):
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
        finally:
            os.close(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The umask of this process, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _flush(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if path.is_symlink():
                continue
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _flush_folder(Path(root))


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
