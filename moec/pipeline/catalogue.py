"""Describes passes to people and programs, from the pass classes alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moec.errors import MoecError
from moec.pipeline.base import Pass
from moec.pipeline.options import pass_options
from moec.pipeline.registry import BUILTIN, PassEntry, clashes, find_entry, pass_entries


@dataclass(frozen=True)
class OptionDescription:
    """One option of a pass; `default` is its text, or `required`."""

    name: str
    type: str
    default: str
    help: str


@dataclass(frozen=True)
class StatisticDescription:
    """One counter of a pass."""

    name: str
    description: str


@dataclass(frozen=True)
class PassDescription:
    """Everything that a pass says of itself. `description` is the whole docstring of its class."""

    name: str
    distribution: str
    summary: str
    description: str
    claim: str
    anchor: str
    options: tuple[OptionDescription, ...]
    statistics: tuple[StatisticDescription, ...]


def describe(name: str) -> PassDescription:
    """The pass `name` or `distribution:name`; raises PipelineError or PluginError."""
    entry = find_entry(name)
    return _describe(entry, entry.load())


def describe_all(*, builtin_only: bool = False) -> tuple[list[PassDescription], list[str]]:
    """All passes by name, and in words what is wrong with the others: clashes, and plug-ins that do not work."""
    found = []
    problems = [] if builtin_only else [str(clash) for clash in clashes()]
    for entries in pass_entries().values():
        for entry in entries:
            if builtin_only and entry.distribution != BUILTIN:
                continue
            try:
                found.append(_describe(entry, entry.load()))
            except MoecError as error:
                problems.append(str(error))
    return found, problems


def _describe(entry: PassEntry, cls: type[Pass]) -> PassDescription:
    return PassDescription(
        entry.name,
        entry.distribution,
        cls.summary(),
        cls.description(),
        cls.claim.value,
        cls.anchor,
        tuple(OptionDescription(o.name, o.kind_text, o.default_text, o.help) for o in pass_options(cls)),
        tuple(StatisticDescription(statistic.name, statistic.description) for statistic in cls.statistic_list()),
    )


def as_dictionary(description: PassDescription) -> dict[str, Any]:
    """The description as plain data for JSON."""
    return asdict(description)


def list_text(descriptions: list[PassDescription]) -> str:
    """One line per pass."""
    names = [
        entry.name if entry.distribution == BUILTIN else f"{entry.distribution}:{entry.name}" for entry in descriptions
    ]
    width = max(map(len, names), default=0)
    lines = [
        f"{name.ljust(width)}  {description.claim:5}  {description.summary}"
        for name, description in zip(names, descriptions, strict=True)
    ]
    return "\n".join(lines)


def text_of(description: PassDescription) -> str:
    """The help of one pass."""
    lines = [f"{description.name}: {description.summary}", ""]
    rest = description.description.partition("\n")[2].strip("\n")
    if rest:
        lines += [rest, ""]
    claim = "the function is preserved" if description.claim == "exact" else "the function changes, and is measured"
    lines.append(f"Claims: {description.claim} ({claim}).")
    lines.append(f"From: {description.distribution}. Runs on: {description.anchor or 'a module or each function'}.")
    if description.options:
        lines += ["", "Options:"]
        rows = [(f"{o.name}=<{o.type}>", f"{o.help} (default {o.default})") for o in description.options]
        width = max(len(left) for left, _ in rows)
        lines += [f"  {left.ljust(width)}  {right}" for left, right in rows]
    if description.statistics:
        lines += ["", "Statistics:"]
        width = max(len(statistic.name) for statistic in description.statistics)
        lines += [f"  {s.name.ljust(width)}  {s.description}" for s in description.statistics]
    return "\n".join(lines)


def markdown_page(descriptions: list[PassDescription]) -> str:
    """The page docs/passes.md."""
    lines = [
        "# Passes",
        "",
        "Written by `moec passes --markdown > docs/passes.md` from the pass classes; do not edit it by hand.",
        "How to write one is in [writing_a_pass.md](writing_a_pass.md).",
        "",
        "| pass | claim | summary |",
        "| --- | --- | --- |",
    ]
    lines += [f"| [`{d.name}`](#{d.name}) | {d.claim} | {_cell(d.summary)} |" for d in descriptions]
    for description in descriptions:
        lines += ["", f"## {description.name}", "", description.description]
        if description.options:
            lines += ["", "| option | type | default | meaning |", "| --- | --- | --- | --- |"]
            for option in description.options:
                kind, default = _cell(option.type), _cell(option.default)
                lines.append(f"| `{option.name}` | {kind} | `{default}` | {_cell(option.help)} |")
        if description.statistics:
            lines += ["", "| statistic | counts |", "| --- | --- |"]
            lines += [f"| `{s.name}` | {_cell(s.description)} |" for s in description.statistics]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
