"""Pipeline text: `a,b{k=v flag},func.func(c,d)`, as MLIR writes it.

Names are separated by commas; options stand in braces, separated by blanks, `name=value` or a bare flag; a value that
holds blanks or braces is quoted with ' or " or wrapped in braces. `func.func(...)` runs passes on each function, and
`builtin.func(...)` is another spelling of it; `builtin.module(...)` around passes of the module changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from moec.errors import UsageError

ANCHORS = {"builtin.module": "builtin.module", "func.func": "func.func", "builtin.func": "func.func"}
MAX_NESTING = 20

_NAME = re.compile(r"[A-Za-z_][\w.\-]*(?::[A-Za-z_][\w.\-]*)?", re.ASCII)
_OPTION = re.compile(r"[A-Za-z_][\w\-]*", re.ASCII)
_BARE_VALUE = re.compile(r"[^\s{}'\"]+")


class PipelineError(UsageError):
    """The pipeline text is malformed, or names an unknown pass or option."""


@dataclass(frozen=True)
class PassSpec:
    """One pass by name with its options as text; None is a bare flag."""

    name: str
    options: tuple[tuple[str, str | None], ...] = ()

    def __str__(self) -> str:
        if not self.options:
            return self.name
        return self.name + "{" + " ".join(_option_text(key, value) for key, value in self.options) + "}"


@dataclass(frozen=True)
class NestedSpec:
    """Passes that run on each operation called `anchor`."""

    anchor: str
    items: tuple[PassSpec | NestedSpec, ...]

    def __str__(self) -> str:
        return f"{self.anchor}({','.join(map(str, self.items))})"


PipelineItem = PassSpec | NestedSpec


def parse_pipeline_text(text: str) -> tuple[PipelineItem, ...]:
    """Reads pipeline text.

    Raises:
        PipelineError: malformed text; the message shows where.
    """
    parser = _Parser(text)
    items = parser.items(0)
    parser.skip()
    if parser.at < len(text):
        raise parser.error(f"unexpected {text[parser.at]!r}")
    return tuple(_without_outer_module(items))


def pipeline_text(items: tuple[PipelineItem, ...]) -> str:
    """The canonical text of a pipeline."""
    return ",".join(map(str, items))


def quote(value: str) -> str:
    """An option value in the form that reads back."""
    if _BARE_VALUE.fullmatch(value):
        return value
    for mark in ('"', "'"):
        if mark not in value:
            return f"{mark}{value}{mark}"
    raise PipelineError(f"an option value cannot hold both kinds of quotes: {value}")


def _option_text(key: str, value: str | None) -> str:
    return key if value is None else f"{key}={quote(value)}"


def _without_outer_module(items: list[PipelineItem]) -> Iterator[PipelineItem]:
    for item in items:
        if isinstance(item, NestedSpec) and item.anchor == "builtin.module":
            yield from item.items
        else:
            yield item


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def error(self, message: str, at: int | None = None) -> PipelineError:
        where = self.at if at is None else at
        shown = f"{self.text[max(0, where - 40) : where]}>>>{self.text[where : where + 40]}"
        return PipelineError(
            f"pipeline: {message}",
            where=f"column {where + 1}: {shown}",
            hint="write passes as `a,b{option=value flag},func.func(c)`",
        )

    def skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def peek(self) -> str:
        self.skip()
        return self.text[self.at] if self.at < len(self.text) else ""

    def take(self, mark: str) -> bool:
        if self.peek() == mark:
            self.at += 1
            return True
        return False

    def items(self, depth: int) -> list[PipelineItem]:
        if depth > MAX_NESTING:
            raise self.error(f"nested deeper than {MAX_NESTING} levels")
        found: list[PipelineItem] = []
        if self.peek() in ("", ")"):
            return found
        while True:
            found.append(self.item(depth))
            if not self.take(","):
                return found

    def item(self, depth: int) -> PipelineItem:
        self.skip()
        start = self.at
        match = _NAME.match(self.text, self.at)
        if match is None:
            found = self.peek()
            raise self.error(
                f"expected the name of a pass, found {found!r}" if found else "expected the name of a pass"
            )
        self.at = match.end()
        name = match.group()
        if self.take("("):
            anchor = ANCHORS.get(name)
            if anchor is None or (anchor == "builtin.module" and depth):
                raise self.error(f"passes cannot be nested in {name}; use func.func(...)", start)
            inner = self.items(depth + 1)
            if not self.take(")"):
                raise self.error("missing ')'")
            return NestedSpec(anchor, tuple(inner))
        options = self.options() if self.take("{") else ()
        return PassSpec(name, options)

    def options(self) -> tuple[tuple[str, str | None], ...]:
        found: dict[str, str | None] = {}
        while not self.take("}"):
            start = self.at
            match = _OPTION.match(self.text, self.at)
            if match is None:
                raise self.error("expected an option or '}'" if self.peek() else "missing '}'")
            self.at = match.end()
            key = match.group().replace("_", "-")
            if key in found:
                raise self.error(f"option {key} is given twice", start)
            found[key] = self.value() if self.at < len(self.text) and self.text[self.at] == "=" else None
        return tuple(found.items())

    def value(self) -> str:
        self.at += 1
        first = self.text[self.at : self.at + 1]
        if first and first in "'\"":
            end = self.text.find(first, self.at + 1)
            if end < 0:
                raise self.error(f"missing closing {first}")
            value = self.text[self.at + 1 : end]
            self.at = end + 1
            return value
        if first == "{":
            return self._braced()
        match = _BARE_VALUE.match(self.text, self.at)
        if match is None:
            return ""
        self.at = match.end()
        # `{a=1, b=2}` is read as people mean it
        return match.group().rstrip(",")

    def _braced(self) -> str:
        start, depth = self.at, 0
        for at in range(start, len(self.text)):
            depth += (self.text[at] == "{") - (self.text[at] == "}")
            if depth == 0:
                self.at = at + 1
                return self.text[start + 1 : at]
        raise self.error("missing '}'", start)
