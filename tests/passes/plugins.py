"""Installed packages with passes, for tests: a module and a dist-info folder on the path."""

from __future__ import annotations

from pathlib import Path

import pytest

HEAD = """from dataclasses import dataclass
from typing import ClassVar
from moec.ir import *
from moec.pipeline import *

"""


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, distribution: str, source: str, passes: dict[str, str]
) -> None:
    """Makes a distribution whose module (its name with underscores) holds `source`; `passes` are entry points."""
    module = distribution.replace("-", "_")
    place = folder / distribution
    info = place / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (place / f"{module}.py").write_text(HEAD + source, encoding="utf-8")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n", encoding="utf-8")
    points = "\n".join(f"{name} = {module}:{target}" for name, target in passes.items())
    (info / "entry_points.txt").write_text(f"[moec.passes]\n{points}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(place))


def pass_source(name: str, body: str, class_name: str = "ThePass", fields: str = "") -> str:
    """A pass class; `body` is the body of `run(self, op, context)`."""
    return (
        f'@register_pass("{name}")\n@dataclass(frozen=True)\nclass {class_name}(Pass):\n    """Of a plug-in."""\n\n'
        f"    {fields or 'pass'}\n\n    def run(self, op, context):\n        {body}\n"
    )
