"""The user's cache folder: computed tensors, and which hard links moec made itself."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`moec` in `$XDG_CACHE_HOME`, else in `~/.cache`; it need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "moec"


def remember_link(path: Path) -> None:
    """Notes that the extra name of the file `path` is moec's own, made for weights that are used in place."""
    status = path.stat()
    note = _note(status)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(_state(status), encoding="utf-8")


def is_own_link(status: os.stat_result) -> bool:
    """Whether moec made the extra name of a file, and the file has not changed since."""
    note = _note(status)
    return note.is_file() and note.read_text(encoding="utf-8") == _state(status)


def _note(status: os.stat_result) -> Path:
    return cache_folder() / "links" / f"{status.st_dev}-{status.st_ino}"


def _state(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns}\n"
