"""The text that the quality models are about: Python's own standard library, and the slices of it that are kept aside.

    python -m tests.quality.corpus     # writes the slices in tests/quality/data from the running interpreter

A module of which any line is in a slice is left out of training as a whole.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

DATA = Path(__file__).parent / "data"

EXTRACT_BYTES = 8192

SLICES: dict[str, tuple[str, ...]] = {
    "calibration": (
        "argparse.py",
        "csv.py",
        "email/header.py",
        "gzip.py",
        "imaplib.py",
        "inspect.py",
        "ipaddress.py",
        "json/decoder.py",
        "logging/handlers.py",
        "multiprocessing/pool.py",
        "tempfile.py",
        "textwrap.py",
        "threading.py",
        "tkinter/ttk.py",
        "unittest/mock.py",
        "urllib/request.py",
    ),
    "selection": (
        "asyncio/streams.py",
        "configparser.py",
        "heapq.py",
        "http/cookies.py",
        "plistlib.py",
        "xml/sax/saxutils.py",
    ),
    "heldout": (
        "concurrent/futures/_base.py",
        "difflib.py",
        "fractions.py",
        "html/parser.py",
        "mailbox.py",
        "shutil.py",
        "statistics.py",
        "wsgiref/handlers.py",
    ),
}

# Tables and other languages' text, tests, and what is not part of the library itself.
_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3"}
)


def library() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def slice_path(name: str) -> Path:
    """The text file of a slice: calibration, selection or heldout."""
    return DATA / f"python.{name}.txt"


def training_text() -> bytes:
    """All modules that no slice takes from, in the order of their paths, each followed by an empty line."""
    root = library()
    reserved = {module for modules in SLICES.values() for module in modules}
    parts = []
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if _LEFT_OUT.isdisjoint(place.parts) and place.as_posix() not in reserved and place.name[:7] != "_syscon":
            parts.append(path.read_bytes() + b"\n")
    return b"".join(parts)


def extract(path: Path) -> str:
    """Whole lines of a module, about `EXTRACT_BYTES` of them, from an eighth of its length on."""
    text = path.read_text(encoding="utf-8")
    start = text.index("\n", len(text) // 8) + 1
    stop = text.rfind("\n", start, start + EXTRACT_BYTES) + 1
    return text[start:stop]


def main() -> None:
    """Writes the slices."""
    DATA.mkdir(exist_ok=True)
    for name, modules in SLICES.items():
        slice_path(name).write_text("".join(extract(library() / module) for module in modules), encoding="utf-8")
        print(f"{slice_path(name)}: {slice_path(name).stat().st_size} bytes")


if __name__ == "__main__":
    main()
