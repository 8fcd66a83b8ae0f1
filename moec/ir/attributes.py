"""Attributes: the compile-time facts of an operation.

An attribute is an immutable Python value: `bool`, `int`, `float`, `str`, `None` (MLIR's unit), a tuple of attributes,
a `DType`, a `Type`, a size expression, a member of a registered enum, an instance of a registered frozen dataclass, a
symbol reference or
a dense constant. Frozen dataclasses and enums of a dialect join by `@struct_attribute("moe.class")` and
`@enum_attribute("moe.score")`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from moec.ir.dimensions import DimExpr
from moec.ir.types import DType, Type

ClassT = TypeVar("ClassT", bound=type)

STRUCTS: dict[str, type[Any]] = {}
ENUMS: dict[str, type[Enum]] = {}
MNEMONIC: dict[type[Any], str] = {}


@dataclass(frozen=True, slots=True)
class SymbolReference:
    """`@name`: a symbol of the module, such as a function."""

    name: str


@dataclass(frozen=True, slots=True)
class DenseConstant:
    """Raw little-endian elements of a small tensor, in row-major order; shape and element type are those of the
    result."""

    data: bytes

    def __repr__(self) -> str:
        return f"DenseConstant({len(self.data)} bytes)"


Attribute = (
    bool | int | float | str | None | DType | Type | DimExpr | Enum | SymbolReference | DenseConstant | tuple[Any, ...]
)


def struct_attribute(mnemonic: str) -> Callable[[ClassT], ClassT]:
    """Registers a frozen dataclass whose text is `#mnemonic<field = value, ...>`."""

    def register(kind: ClassT) -> ClassT:
        if not is_dataclass(kind):
            raise TypeError(f"{kind.__name__} must be a frozen dataclass")
        STRUCTS[mnemonic] = kind
        MNEMONIC[kind] = mnemonic
        return kind

    return register


def enum_attribute(mnemonic: str) -> Callable[[ClassT], ClassT]:
    """Registers an enum whose text is `#mnemonic<value>`."""

    def register(kind: ClassT) -> ClassT:
        ENUMS[mnemonic] = kind
        MNEMONIC[kind] = mnemonic
        return kind

    return register


def is_attribute(value: object) -> bool:
    """Whether a Python value can stand as an attribute."""
    if value is None or isinstance(
        value, bool | int | float | str | DimExpr | Type | DType | SymbolReference | DenseConstant
    ):
        return True
    if isinstance(value, tuple):
        return all(map(is_attribute, value))
    return type(value) in MNEMONIC


def struct_fields(value: object) -> Iterator[tuple[str, Any]]:
    """(name, value) of the fields of a registered dataclass that differ from their defaults."""
    for field in fields(value):  # type: ignore[arg-type]
        item = getattr(value, field.name)
        if item != field.default or type(item) is not type(field.default):
            yield field.name, item


def struct_problem(value: object) -> str | None:
    """The first field, of a registered dataclass or of one in a tuple, that is not of its declared type, in words."""
    if isinstance(value, tuple):
        return next((problem for problem in map(struct_problem, value) if problem), None)
    kind = type(value)
    if kind not in MNEMONIC or not is_dataclass(kind):
        return None
    for name, declared in _field_types(kind).items():
        item = getattr(value, name)
        if not _is_of(item, declared):
            return f"{name} of #{MNEMONIC[kind]} must be {getattr(declared, '__name__', declared)}, found {item!r}"
    return None


@cache
def _field_types(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind)


def _is_of(value: object, declared: Any) -> bool:
    if get_origin(declared) is tuple:
        return isinstance(value, tuple) and all(_is_of(item, get_args(declared)[0]) for item in value)
    if declared is float:
        return type(value) in (float, int)
    if declared is int:
        return type(value) is int
    return isinstance(value, declared)
