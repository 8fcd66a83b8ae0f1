"""Which passes there are: those of the folder `passes/`, those of installed packages, and those of a running program.

Built-in passes are found by scanning the source files for `@register_pass("name")`, so that listing names imports
none of them; a pass is imported when it is asked for. Packages add passes by the entry point group `moec.passes`.
A built-in keeps its name; `distribution:name` chooses another one.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from moec.errors import MoecError, UsageError
from moec.pipeline.base import Pass
from moec.pipeline.options import suggestion
from moec.pipeline.spec import PipelineError

ENTRY_POINT_GROUP = "moec.passes"
BUILTIN = "moec"
_REGISTERED = re.compile(r"^@register_pass\(\s*[\"']([^\"']+)[\"']\s*\)", re.MULTILINE)


class PluginError(UsageError):
    """A pass of another distribution cannot be used."""


@dataclass(frozen=True)
class PassEntry:
    """Where a pass comes from: its distribution, and how to get at its class."""

    name: str
    distribution: str
    module: str
    entry_point: EntryPoint | None = None

    @property
    def qualified_name(self) -> str:
        """`distribution:name`."""
        return f"{self.distribution}:{self.name}"

    def load(self) -> type[Pass]:
        """Imports the pass; raises PluginError, naming the distribution, where a plug-in does not work."""
        if self.entry_point is None:
            found = _classes.get((self.module, self.name))
            if found is None:
                import_module(self.module)
                found = _classes[self.module, self.name]
            return found
        try:
            loaded = self.entry_point.load()
        except Exception as error:  # whatever a plug-in raises on import is its author's to repair
            raise PluginError(
                f"pass {self.name} of the distribution {self.distribution} fails on import: "
                f"{type(error).__name__}: {error}",
                where=f"entry point {self.entry_point.value}",
                hint=f"repair or uninstall {self.distribution}",
            ) from error
        if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
            raise PluginError(
                f"the entry point {self.name} of the distribution {self.distribution} is no pass: {loaded!r}",
                where=f"entry point {self.entry_point.value}",
                hint="it must name a class that derives from moec.pipeline.Pass",
            )
        if loaded.pass_name != self.name:
            raise PluginError(
                f"the entry point {self.name} of the distribution {self.distribution} registers "
                f"{loaded.pass_name or 'no name'!r}",
                where=f"entry point {self.entry_point.value}",
                hint=f'decorate the class with @register_pass("{self.name}")',
            )
        return loaded


@dataclass(frozen=True)
class Clash:
    """Several distributions that offer a pass of one name; the first is used where it is built in."""

    name: str
    entries: tuple[PassEntry, ...]

    def __str__(self) -> str:
        owners = " and ".join(entry.distribution for entry in self.entries)
        others = ", ".join(entry.qualified_name for entry in self.entries if entry.distribution != BUILTIN)
        builtin = any(entry.distribution == BUILTIN for entry in self.entries)
        used = "the built-in one is used; write" if builtin else "choose by"
        return f"pass {self.name} is offered by {owners}; {used} {others}{' for the other' if builtin else ''}"


# (module, name) -> class, filled by the decorator when a module with a pass is imported
_classes: dict[tuple[str, str], type[Pass]] = {}


def remember_class(name: str, cls: type[Pass]) -> None:
    """Called by `register_pass`."""
    _classes[cls.__module__, name] = cls


def pass_entries() -> dict[str, tuple[PassEntry, ...]]:
    """All passes by name; several entries are a clash, the built-in one first."""
    found: dict[str, list[PassEntry]] = {}
    for entry in (*_builtin_entries(), *_plugin_entries(), *_program_entries()):
        others = found.setdefault(entry.name, [])
        if entry.qualified_name not in [other.qualified_name for other in others]:
            others.append(entry)
    return {name: tuple(entries) for name, entries in sorted(found.items())}


def clashes() -> list[Clash]:
    """The names that more than one distribution offers."""
    return [Clash(name, entries) for name, entries in pass_entries().items() if len(entries) > 1]


def find_pass(name: str) -> type[Pass]:
    """The class of the pass `name` or `distribution:name`.

    Raises:
        PipelineError: no such pass, or several and none is built in. PluginError: a plug-in does not work.
    """
    return find_entry(name).load()


def find_entry(name: str) -> PassEntry:
    """Where the pass `name` or `distribution:name` comes from; raises PipelineError."""
    distribution, _, plain = name.rpartition(":")
    entries = pass_entries()
    candidates = [entry for entry in entries.get(plain, ()) if distribution in ("", entry.distribution)]
    if not candidates:
        known = list(entries) if not distribution else [e.qualified_name for es in entries.values() for e in es]
        raise PipelineError(f"there is no pass {name!r}", hint=suggestion(name, known, "the passes"))
    if len(candidates) > 1 and candidates[0].distribution != BUILTIN:
        raise PipelineError(str(Clash(plain, tuple(candidates))))
    return candidates[0]


def load_plugin(name: str) -> None:
    """Imports a Python file, or a module by its dotted name, so that the passes in it can be named.

    Raises:
        PluginError: there is no such file or module, it fails on import, or it registers no pass.
    """
    module = Path(name).stem if name.endswith(".py") else name
    try:
        if name.endswith(".py"):
            _import_file(Path(name))
        else:
            import_module(name)
    except Exception as error:  # whatever a plug-in raises on import is its author's to repair
        raise PluginError(f"the plug-in {name} fails on import: {type(error).__name__}: {error}") from error
    if not any(found == module or found.startswith(f"{module}.") for found, _ in _classes):
        raise PluginError(f"the plug-in {name} registers no pass", hint="decorate a class with @register_pass")


def _import_file(path: Path) -> None:
    spec = spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    module = module_from_spec(spec)
    # dataclasses look up the module of a class by its name
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)


@cache
def _builtin_entries() -> tuple[PassEntry, ...]:
    spec = find_spec("moec.passes")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    entries = []
    for folder in map(Path, folders):
        for file in sorted(folder.rglob("*.py")):
            module = ".".join(("moec.passes", *file.relative_to(folder).with_suffix("").parts))
            for name in _REGISTERED.findall(file.read_text(encoding="utf-8")):
                entries.append(PassEntry(name, BUILTIN, module.removesuffix(".__init__")))
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise MoecError(f"two built-in passes are called {name}")
    return tuple(entries)


def _plugin_entries() -> list[PassEntry]:
    entries = []
    for point in entry_points(group=ENTRY_POINT_GROUP):
        distribution: Any = point.dist
        entries.append(PassEntry(point.name, distribution.name if distribution else "?", point.module, point))
    return sorted(entries, key=lambda entry: entry.qualified_name)


def _program_entries() -> list[PassEntry]:
    """Passes of modules that are neither built in nor installed as plug-ins: a notebook, a script, a test."""
    taken = {entry.module for entry in (*_builtin_entries(), *_plugin_entries())}
    return [
        PassEntry(name, module.partition(".")[0], module)
        for (module, name) in _classes
        if module not in taken and not module.startswith("moec.passes.")
    ]
