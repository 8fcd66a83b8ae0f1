"""ATen: one operation per overload, as torch.export gives it, functional and checked against torch's own schemas.

Tensor arguments are operands in schema order; every other argument is an attribute named as in the schema, left out
where it equals the default. `operand_layout` names the schema argument of each operand, so that absent optional
tensors and tensor lists
are clear; an item of a list of optional tensors carries its position, as in `indices:1`. Sizes are attributes
(integers or size expressions),
never values.

The schemas are those of torch 2.13.0, kept as text in `aten_schemas.txt` (`python -m
moec.dialects.aten_schema_update` writes it), so that reading IR does not need torch.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Any

from moec.ir.definition import Attr, Op
from moec.ir.dimensions import DimExpr
from moec.ir.location import UNKNOWN, Location
from moec.ir.operation import Operation, Value
from moec.ir.types import DType, TensorType, Type
from moec.ir.verifier import VerifyError


@dataclass(frozen=True, slots=True)
class SchemaArgument:
    """One argument of an overload. `kind` is the schema's type, such as `SymInt[2]` or `float?`; `default` is
    meaningful only where `has_default`."""

    name: str
    kind: str
    is_tensor: bool
    is_list: bool
    is_optional: bool
    has_default: bool
    default: Any


@dataclass(frozen=True, slots=True)
class Schema:
    """An overload: its arguments by name, in order, and how many tensors it returns (None: a list)."""

    arguments: dict[str, SchemaArgument]
    result_count: int | None


@cache
def _schema_lines() -> dict[str, str]:
    text = resources.files("moec.dialects").joinpath("aten_schemas.txt").read_text(encoding="utf-8")
    lines = {}
    for line in text.splitlines():
        name = line[: line.index("(")]
        lines[name if "." in name else f"{name}.default"] = line
    return lines


@lru_cache(maxsize=1024)
def schema(op_name: str) -> Schema | None:
    """The schema of `aten.add.Tensor`; None where torch has no such overload."""
    line = _schema_lines().get(op_name.removeprefix("aten."))
    if line is None:
        return None
    body, _, returns = line[line.index("(") + 1 :].rpartition(") -> ")
    arguments = {}
    for piece in _split(body):
        if piece == "*":
            continue
        kind, _, rest = piece.partition(" ") if not piece.startswith("Dict") else piece.rpartition(" ")
        name, has_default, default = rest.partition("=")
        arguments[name] = SchemaArgument(
            name,
            kind,
            kind.startswith("Tensor"),
            "[" in kind,
            kind.endswith("?") or "?" in kind,
            bool(has_default),
            _default(default) if has_default else None,
        )
    count = None if "[]" in returns else len(_split(returns.strip("()"))) if returns != "()" else 0
    return Schema(arguments, count)


def _split(text: str) -> list[str]:
    pieces, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            pieces.append(text[start:at].strip())
            start = at + 1
    rest = text[start:].strip()
    return [*pieces, rest] if rest else pieces


def _default(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        # names such as `Mean` and `contiguous_format` are strings to us
        return re.sub(r"^\"|\"$", "", text)
    return tuple(value) if isinstance(value, list) else value


class AtenOp(Op, pure=True, open_attributes=True):
    """Any operation of the aten dialect."""

    operand_layout = Attr(tuple, ())

    def tensors(self, name: str) -> tuple[Value, ...]:
        """The operands of the schema argument `name`: none, one, or the items of a list."""
        layout = self.operand_layout
        return tuple([value for value, key in zip(self._operands, layout, strict=True) if key == name])

    def positioned_tensors(self, name: str) -> dict[int, Value]:
        """The operands of a list of optional tensors by their position in the list."""
        found = {}
        for value, key in zip(self._operands, self.operand_layout, strict=True):
            argument, _, position = key.partition(":")
            if argument == name and position.isdigit():
                found[int(position)] = value
        return found

    def tensor(self, name: str) -> Value:
        """The one operand of the schema argument `name`; raises KeyError where it is absent."""
        found = self.tensors(name)
        if len(found) != 1:
            raise KeyError(f"{self.name} has {len(found)} operands for {name}")
        return found[0]

    def argument(self, name: str) -> Any:
        """A non-tensor argument, or its default in the schema; raises KeyError for a name that the schema lacks."""
        if name in self.attributes:
            return self.attributes[name]
        found = schema(self.name)
        if found is None:
            raise KeyError(name)
        return found.arguments[name].default

    def verify_op(self) -> None:
        found = schema(self.name)
        if found is None:
            raise VerifyError(f"torch has no operation {self.name}", self)
        if len(self.operand_layout) != self.operand_count:
            named = len(self.operand_layout)
            raise VerifyError(f"{self.name}: operand_layout names {named} of {self.operand_count} operands", self)
        layout = [key.partition(":")[0] for key in self.operand_layout]
        names = list(found.arguments)
        position = -1
        for key in layout:
            argument = found.arguments.get(key)
            if argument is None or not (argument.is_tensor or argument.name in _NUMBER_ARGUMENTS):
                raise VerifyError(f"{self.name} has no tensor argument {key!r}", self)
            at = names.index(key)
            if at < position or (at == position and not argument.is_list):
                raise VerifyError(
                    f"{self.name}: operand_layout {list(self.operand_layout)} is not in schema order", self
                )
            position = at
        for key, value in self.attributes.items():
            if key != "operand_layout" and (key not in found.arguments or key in layout):
                raise VerifyError(f"{self.name} has no attribute {key!r}", self)
            if key != "operand_layout" and not _fits(value, found.arguments[key].kind):
                raise VerifyError(f"{self.name}: {key} must be {found.arguments[key].kind}, found {value!r}", self)
        for argument in found.arguments.values():
            given = argument.name in layout or argument.name in self.attributes
            empty_list = argument.is_tensor and argument.is_list
            if not given and not argument.has_default and not argument.is_optional and not empty_list:
                raise VerifyError(f"{self.name} needs {argument.name}", self)
        if found.result_count is not None and len(self.results) != found.result_count:
            raise VerifyError(f"{self.name} gives {found.result_count} results, not {len(self.results)}", self)
        for value in (*self._operands, *self.results):
            if not isinstance(value.type, TensorType):
                raise VerifyError(f"{self.name} works on tensors, not on {value.type}", self)


def _fits(value: object, kind: str) -> bool:
    """Whether an attribute is of a type of the schema. Layouts, devices and the like are not looked at."""
    base = kind.rstrip("?")
    if value is None:
        return kind.endswith("?")
    if base.endswith("]"):
        item = base[: base.rindex("[")]
        if isinstance(value, tuple):
            return all(_fits(element, item) for element in value)
        # `int[2]` may be given as one number for both
        return not base.endswith("[]") and _fits(value, item)
    if base in ("int", "SymInt"):
        return isinstance(value, int | DimExpr) and not isinstance(value, bool)
    if base == "float":
        return isinstance(value, float | int) and not isinstance(value, bool)
    if base == "bool":
        return isinstance(value, bool)
    if base in ("Scalar", "Tensor"):
        return isinstance(value, bool | int | float | DimExpr)
    if base == "ScalarType":
        return isinstance(value, DType)
    return base != "str" or isinstance(value, str)


# scalars that torch lets a zero-dimensional tensor stand for
_NUMBER_ARGUMENTS = frozenset({"other", "value", "exponent"})

Operation.open_dialects["aten"] = AtenOp


def build(
    name: str,
    tensors: dict[str, Value | tuple[Value, ...]],
    result_types: tuple[Type, ...],
    location: Location = UNKNOWN,
    **arguments: Any,
) -> AtenOp:
    """`aten.<name>` from tensor arguments by name, in schema order, and other arguments by name; defaults are left
    out."""
    found = schema(name)
    operands: list[Value] = []
    layout: list[str] = []
    for key, given in tensors.items():
        values = given if isinstance(given, tuple) else (given,)
        operands += values
        layout += [key] * len(values)
    attributes: dict[str, Any] = {"operand_layout": tuple(layout)} if layout else {}
    for key, value in arguments.items():
        argument = found.arguments.get(key) if found else None
        default = argument is not None and argument.has_default
        if not (
            default and argument is not None and type(value) is type(argument.default) and value == argument.default
        ):
            attributes[key] = value
    op = Operation.create(f"aten.{name}", operands, result_types, attributes, [], location)
    if not isinstance(op, AtenOp):
        raise VerifyError(f"aten.{name} is taken by another class")
    return op
