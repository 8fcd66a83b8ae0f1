"""Where an operation came from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Location:
    """A file position, a named scope of the source model, or both.

    `name` is a scope such as the module path `model.layers.0.mlp`; `file`, `line` and `column` are 1-based and 0
    where unknown.
    """

    name: str = ""
    file: str = ""
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        position = f"{self.file}:{self.line}:{self.column}" if self.file else ""
        if self.name and position:
            return f"{self.name} ({position})"
        return self.name or position or "unknown location"


UNKNOWN = Location()
