"""Crash reproducers: one .mlir file that holds the IR before the failing pass and what is needed to run it again."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moec.errors import UsageError

MARK = "// moec reproducer"
_LINE = re.compile(r"//   (\w+): (.*)")
_PACKAGES = ("moec", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class Reproducer:
    """The header of a reproducer file. `error` is the one-line message of the failure."""

    pipeline: str
    seed: int = 0
    verify_each: bool = True
    error: str = ""
    versions: str = ""

    def header(self) -> str:
        """The comment lines that stand above the IR."""
        lines = [f"{MARK}; run it again with: moec opt --run-reproducer FILE"]
        for name, value in (
            ("pipeline", self.pipeline),
            ("seed", str(self.seed)),
            ("verify_each", str(self.verify_each).lower()),
            ("error", " ".join(self.error.split())),
            ("versions", self.versions),
        ):
            lines.append(f"//   {name}: {value}")
        return "\n".join(lines) + "\n"


def installed_versions(distributions: Sequence[str] = ()) -> str:
    """`python 3.11.9, moec 0.1.0, ...` of what bears on a run, `distributions` included; packages that are missing
    are left out."""
    found = [f"python {platform.python_version()}"]
    for name in dict.fromkeys((*_PACKAGES, *distributions)):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def write_reproducer(path: Path, reproducer: Reproducer, ir_text: str) -> None:
    """Writes the file; the folder must exist."""
    path.write_text(f"{reproducer.header()}{ir_text}\n", encoding="utf-8")


def read_reproducer(text: str, file: str) -> Reproducer:
    """The header of a reproducer file; its IR is read as that of any other file.

    Raises:
        UsageError: the text does not start with such a header.
    """
    lines = text.splitlines()
    values: dict[str, str] = {}
    if lines and lines[0].startswith(MARK):
        for line in lines[1:]:
            match = _LINE.fullmatch(line)
            if match is None:
                break
            values[match.group(1)] = match.group(2)
    seed = values.get("seed", "0")
    if "pipeline" not in values or not seed.lstrip("-").isdigit():
        raise UsageError(
            "the file is no reproducer: it does not start with the comment lines of one",
            where=file,
            hint="give a pipeline with -p to run passes on an ordinary file",
        )
    return Reproducer(
        values["pipeline"],
        int(seed),
        values.get("verify_each", "true") == "true",
        values.get("error", ""),
        values.get("versions", ""),
    )
