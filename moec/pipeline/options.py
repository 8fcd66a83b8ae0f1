"""Options of a pass from text, typed by the fields of its dataclass; and back to text."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from moec.pipeline.base import Pass
from moec.pipeline.spec import PassSpec, PipelineError


@dataclasses.dataclass(frozen=True)
class PassOption:
    """One option: its spelling in pipeline text, its Python type, default (MISSING where required) and help."""

    name: str
    field: str
    kind: Any
    default: Any
    help: str

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def kind_text(self) -> str:
        """The type in words, such as `int`, `list of int` or `topk|topp`."""
        return _kind_text(self.kind)

    @property
    def default_text(self) -> str:
        """The default as it would stand in pipeline text; `required` where there is none."""
        return "required" if self.required else value_text(self.default)


def pass_options(cls: type[Pass]) -> tuple[PassOption, ...]:
    """The options of a pass class, in the order of its fields."""
    hints = get_type_hints(cls)
    options = []
    for field in dataclasses.fields(cls):
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        name = field.name.replace("_", "-")
        options.append(PassOption(name, field.name, hints[field.name], default, field.metadata.get("help", "")))
    return tuple(options)


def build_pass(cls: type[Pass], spec: PassSpec) -> Pass:
    """The pass with the options of `spec`.

    Raises:
        PipelineError: an unknown or missing option, or a value that is not of the option's type.
    """
    known = {option.name: option for option in pass_options(cls)}
    values: dict[str, Any] = {}
    for name, text in spec.options:
        option = known.get(name)
        if option is None:
            raise PipelineError(
                f"pass {spec.name} has no option {name!r}", where=str(spec), hint=suggestion(name, known, "its options")
            )
        values[option.field] = _parse(option, text, spec)
    for option in known.values():
        if option.required and option.field not in values:
            raise PipelineError(
                f"pass {spec.name} needs the option {option.name}",
                where=str(spec),
                hint=f"write {spec.name}{{{option.name}=...}} ({option.kind_text}: {option.help})",
            )
    try:
        return cls(**values)
    except ValueError as error:
        raise PipelineError(f"pass {spec.name}: {error}", where=str(spec)) from None


def pass_text(instance: Pass) -> str:
    """The pass as pipeline text, with the options that differ from their defaults."""
    given = []
    for option in pass_options(type(instance)):
        value = getattr(instance, option.field)
        if option.required or value != option.default:
            given.append((option.name, None if value is True else value_text(value)))
    return str(PassSpec(instance.pass_name, tuple(given)))


def value_text(value: Any) -> str:
    """An option value as pipeline text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, tuple):
        return ",".join(value_text(item) for item in value)
    return repr(value) if isinstance(value, float) else str(value)


def suggestion(name: str, known: Iterable[str], what: str) -> str:
    """`did you mean ...?` for a near name, else the list of what there is."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 1, 0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"{what} are {', '.join(names)}" if names else "it has none"


def _parse(option: PassOption, text: str | None, spec: PassSpec) -> Any:
    if text is None:
        if option.kind is bool or bool in get_args(option.kind):
            return True
        raise PipelineError(
            f"pass {spec.name}: option {option.name} needs a value", where=str(spec), hint=f"a {option.kind_text}"
        )
    try:
        return _convert(option.kind, text)
    except ValueError as error:
        raise PipelineError(
            f"pass {spec.name}: {text!r} is no {option.kind_text} for the option {option.name}",
            where=str(spec),
            hint=str(error) if str(error) and "literal" not in str(error) else "",
        ) from None


def _convert(kind: Any, text: str) -> Any:
    """`text` as a value of the type `kind`; raises ValueError."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if text == "none":
            return None
        return _convert(next(item for item in get_args(kind) if item is not type(None)), text)
    if origin is tuple:
        item = get_args(kind)[0]
        return tuple(_convert(item, piece.strip()) for piece in text.split(",")) if text else ()
    if origin is Literal:
        if text not in get_args(kind):
            raise ValueError(suggestion(text, get_args(kind), "the choices"))
        return text
    if kind is bool:
        if text not in ("true", "false", "1", "0"):
            raise ValueError("write true or false")
        return text in ("true", "1")
    if isinstance(kind, type) and issubclass(kind, Enum):
        for member in kind:
            if text == str(member.value):
                return member
        raise ValueError(suggestion(text, [str(member.value) for member in kind], "the choices"))
    if kind in (int, float, str, Path):
        return kind(text)
    raise TypeError(f"options of type {kind} cannot be read from text")


def _kind_text(kind: Any) -> str:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return f"{_kind_text(next(item for item in get_args(kind) if item is not type(None)))} or none"
    if origin is tuple:
        return f"list of {_kind_text(get_args(kind)[0])}"
    if origin is Literal:
        return "|".join(map(str, get_args(kind)))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(str(member.value) for member in kind)
    return getattr(kind, "__name__", str(kind)).lower()
