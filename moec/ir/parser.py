"""Reads the text that `printer` writes, and hand-written text of the same form.

One regular expression cuts the whole text into tokens; the text of a type is one token and is parsed once per
distinct text.
"""

from __future__ import annotations

import gc
import math
import re
import struct
from bisect import bisect_right
from enum import Enum
from functools import cached_property, lru_cache
from importlib import import_module
from typing import Any

from moec.errors import UsageError
from moec.ir.attributes import ENUMS, STRUCTS, DenseConstant, SymbolReference
from moec.ir.dimensions import parse_dim
from moec.ir.location import UNKNOWN, Location
from moec.ir.operation import Block, Operation, Region, Value
from moec.ir.types import DType, FunctionType, TensorType, Type

MAX_DEPTH = 200
MAX_SIZE = 2**63 - 1
MAX_INTEGER_DIGITS = 40
_TYPE = r"(?:tensor|!moec\.tensor)<[^<>]*(?:<[^<>]*>[^<>]*)?>|complex<f32>"
# Blanks and comments, then one token, the frequent kinds first. Every alternative takes time linear in what it reads,
# and the last three take what is wrong: an unterminated string up to its line's end, any other character, the end.
_TOKENS = re.compile(
    r"(?:\s+|//[^\n]*)*([(){}\[\]<>,:=]|%[\w$.]+(?:\#\d+)?"
    rf"|{_TYPE}"
    r"|[A-Za-z_][\w$.]*"
    r'|"[^"\\\n]*"|"(?:[^"\\\n]|\\.)*"'
    r'|#moec\.dim<[^<>]*>|#moec\.dense<"[0-9A-Fa-f]*">'
    r"|-?\d+\.\d*(?:[eE][-+]?\d+)?|0x[0-9A-Fa-f]+|-?\d+|->|\^\w+|@[\w$.]+|@\"(?:[^\"\\\n]|\\.)*\"|[\#!][A-Za-z_][\w$.]*"
    r'|"[^\n]*\n|\S|\Z)',
    re.DOTALL | re.ASCII,
)
_PUNCTUATION = frozenset("(){}[]<>,:=")
_DTYPES = {dtype.value: dtype for dtype in DType}
_ESCAPE = re.compile(r'\\([0-9A-Fa-f]{2}|[nt"\\])')


class ParseError(UsageError):
    """The text is malformed. `line` and `column`, from 1, are where."""

    line = 0
    column = 0


def parse_module(text: str, file: str = "") -> Operation:
    """Reads one top-level operation, usually a `builtin.module`, without verifying it.

    With a `file`, operations without `loc(...)` get their line in it as their location.

    Raises:
        ParseError: malformed text, an undefined value, or types that contradict each other.
    """
    import_module("moec.dialects")  # operations that are not registered would pass as unknown ones, unverified
    collecting = gc.isenabled()
    # The graph is full of cycles and all of it stays: the collector would only walk it again and again as it grows.
    gc.disable()
    try:
        parser = _Parser(text, file)
        op = parser.parse_op()
        parser.finish()
    finally:
        if collecting:
            gc.enable()
    return op


parse_operation = parse_module


@lru_cache(maxsize=8192)
def parse_tensor_type(text: str) -> TensorType:
    """Reads `tensor<2x3xf32>` or `!moec.tensor<[batch, 3], f32>`; raises ValueError."""
    body = text[text.index("<") + 1 : -1].strip()
    if text.startswith("tensor"):
        *sizes, element = (
            body.split("x") if not body.endswith("complex<f32>") else [*body[:-12].split("x")[:-1], "complex<f32>"]
        )
        shape: list[Any] = [int(size) for size in sizes]
    else:
        match = re.fullmatch(r"\[(.*)\]\s*,\s*([\w<>]+)", body, re.DOTALL)
        if match is None:
            raise ValueError(f"malformed type {text}")
        inside = match.group(1).strip()
        shape = [parse_dim(size.strip()) for size in inside.split(",")] if inside else []
        element = match.group(2)
    if element.strip() not in _DTYPES:
        raise ValueError(f"unknown element type {element!r} in {text}")
    if not all(0 <= size <= MAX_SIZE for size in shape if isinstance(size, int)):
        raise ValueError(f"a size is not within 0..2**63-1 in {text[:200]}")
    return TensorType(tuple(shape), _DTYPES[element.strip()])


def _is_wrong(token: str) -> bool:
    """Whether the token is one of the last alternatives of the lexer."""
    if len(token) == 1:
        return not (token in _PUNCTUATION or token.isalnum() or token == "_")
    return token.endswith("\n")


class _Parser:
    def __init__(self, text: str, file: str) -> None:
        # the line end makes an unterminated string the only token that ends in one
        self.text, self.file = f"{text}\n", file
        self.tokens: list[str] = _TOKENS.findall(self.text)
        while len(self.tokens) > 1 and not self.tokens[-2]:
            self.tokens.pop()
        self.at = 0
        self.depth = 0
        self.scopes: list[dict[str, Value]] = [{}]
        self.forward: list[dict[str, tuple[Value, int]]] = [{}]
        wrong = {token for token in set(self.tokens) if _is_wrong(token)}
        if wrong:
            at = next(at for at, token in enumerate(self.tokens) if token in wrong)
            token = self.tokens[at]
            raise self.error("unterminated string" if token[0] == '"' else f"unexpected character {token!r}", at)

    @cached_property
    def starts(self) -> list[int]:
        """Where each token starts; needed for locations and errors alone."""
        return [match.start(1) for match in _TOKENS.finditer(self.text)]

    @cached_property
    def line_starts(self) -> list[int]:
        return [0, *[match.end() for match in re.finditer(r"\n", self.text[:-1])]]

    # -- errors and tokens --------------------

    def error(self, message: str, at: int | None = None) -> ParseError:
        line, column = self.position(self.at if at is None else at)
        start = self.line_starts[line - 1]
        shown = self.text[start : self.text.index("\n", start)]
        piece = shown[max(0, column - 60) : column + 60]
        error = ParseError(message, where=f"{self.file or '<text>'}:{line}:{column}: {piece.strip()}")
        error.line, error.column = line, column
        return error

    def position(self, at: int) -> tuple[int, int]:
        offset = min(self.starts[at], len(self.text) - 1)
        line = bisect_right(self.line_starts, offset)
        return line, offset - self.line_starts[line - 1] + 1

    def take(self, token: str) -> bool:
        if self.tokens[self.at] == token:
            self.at += 1
            return True
        return False

    def expect(self, token: str) -> None:
        if self.tokens[self.at] != token:
            found = self.tokens[self.at]
            raise self.error(f"expected {token!r}, found {found!r}" if found else f"expected {token!r} before the end")
        self.at += 1

    def next(self) -> str:
        token = self.tokens[self.at]
        if not token:
            raise self.error("the text ends early")
        self.at += 1
        return token

    def enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error(f"nested deeper than {MAX_DEPTH} levels")

    def finish(self) -> None:
        if self.tokens[self.at]:
            raise self.error(f"unexpected {self.tokens[self.at]!r} after the end of the operation")
        self.report_undefined()

    def report_undefined(self) -> None:
        for name, (_, at) in self.forward[-1].items():
            raise self.error(f"undefined value {name}", at)

    # -- operations --------------------

    def parse_op(self) -> Operation:
        start = self.at
        names: list[tuple[str, int, int]] = []
        while self.tokens[self.at].startswith("%"):
            at = self.at
            name = self.next()
            count = 1
            if self.take(":"):
                digits = self.next()
                count = self.count(digits, "a number of results")
            names.append((name, count, at))
            if not self.take(","):
                self.expect("=")
                break
        token = self.next()
        if not token.startswith('"'):
            raise self.error("expected the name of an operation in quotes", self.at - 1)
        op_name = self.string(token)
        operand_names: list[tuple[str, int]] = []
        self.expect("(")
        while not self.take(")"):
            operand_names.append((self.tokens[self.at], self.at))
            if not self.next().startswith("%"):
                raise self.error("expected an operand", self.at - 1)
            if not self.take(","):
                self.expect(")")
                break
        attributes: dict[str, Any] = {}
        if self.tokens[self.at] == "<" and self.tokens[self.at + 1] == "{":
            self.at += 1
            self.attribute_dictionary(attributes)
            self.expect(">")
        regions: list[Region] = []
        if self.take("("):
            self.enter()
            while True:
                regions.append(self.parse_region())
                if not self.take(","):
                    break
            self.expect(")")
            self.depth -= 1
        if self.tokens[self.at] == "{":
            self.attribute_dictionary(attributes)
        self.expect(":")
        type_at = self.at
        operand_types = self.type_list()
        self.expect("->")
        result_types = self.type_list() if self.tokens[self.at] == "(" else [self.parse_type()]
        if len(operand_types) != len(operand_names):
            given = len(operand_types)
            raise self.error(f"{op_name} has {len(operand_names)} operands but {given} operand types", type_at)
        operands = [self.use(name, kind, at) for (name, at), kind in zip(operand_names, operand_types, strict=True)]
        location = UNKNOWN
        if self.tokens[self.at] == "loc":
            location = self.parse_location()
        if location is UNKNOWN and self.file:
            line, column = self.position(start)
            location = Location(file=self.file, line=line, column=column)
        op = Operation.create(op_name, operands, result_types, attributes, regions, location)
        if sum(count for _, count, _ in names) != (len(result_types) if names else 0):
            raise self.error(
                f"{op_name} has {len(result_types)} results, but the text names {sum(c for _, c, _ in names)}", start
            )
        position = 0
        for name, count, at in names:
            for index in range(count):
                self.define(name if count == 1 else f"{name}#{index}", op.results[position], at)
                position += 1
        return op

    def parse_region(self) -> Region:
        self.enter()
        self.expect("{")
        self.scopes.append({})
        self.forward.append({})
        block = Block()
        if self.tokens[self.at].startswith("^"):
            self.at += 1
            if self.take("("):
                while not self.take(")"):
                    at = self.at
                    name = self.next()
                    if not name.startswith("%"):
                        raise self.error("expected a block argument", at)
                    self.expect(":")
                    self.define(name, block.add_argument(self.parse_type()), at)
                    if self.tokens[self.at] == "loc":
                        self.parse_location()  # as mlir-opt writes it; arguments have no location here
                    if not self.take(","):
                        self.expect(")")
                        break
            self.expect(":")
        while not self.take("}"):
            if self.tokens[self.at].startswith("^"):
                raise self.error("a region holds one block")
            block.append(self.parse_op())
        self.scopes.pop()
        # A name that is still open may be defined later in an outer region; the verifier then reports the dominance
        # error.
        for name, entry in self.forward.pop().items():
            outer = self.forward[-1].setdefault(name, entry)
            if outer is not entry:
                entry[0].replace_all_uses_with(outer[0])
        self.depth -= 1
        return Region(block)

    def define(self, name: str, value: Value, at: int) -> None:
        scope = self.scopes[-1]
        if name in scope:
            raise self.error(f"{name} is defined twice", at)
        scope[name] = value
        pending = self.forward[-1].pop(name, None)
        if pending is not None:
            if pending[0].type != value.type:
                raise self.error(f"{name} is {value.type} here but was used as {pending[0].type}", at)
            pending[0].replace_all_uses_with(value)

    def use(self, name: str, kind: Type, at: int) -> Value:
        for scope in reversed(self.scopes):
            value = scope.get(name)
            if value is not None:
                if value.type is not kind and value.type != kind:
                    raise self.error(f"{name} is {value.type}, not {kind}", at)
                return value
        pending = self.forward[-1].get(name)
        if pending is None:
            pending = self.forward[-1][name] = (Value(kind), at)
        return pending[0]

    # -- types, attributes, locations --------------------

    def type_list(self) -> list[Type]:
        self.expect("(")
        types: list[Type] = []
        while not self.take(")"):
            types.append(self.parse_type())
            if not self.take(","):
                self.expect(")")
                break
        return types

    def parse_type(self) -> Type:
        token = self.next()
        if token.startswith(("tensor<", "!moec.tensor<")):
            try:
                return parse_tensor_type(token)
            except (ValueError, ZeroDivisionError) as error:
                raise self.error(str(error), self.at - 1) from None
        if token == "(":
            self.at -= 1
            self.enter()
            inputs = self.type_list()
            self.expect("->")
            results = self.type_list() if self.tokens[self.at] == "(" else [self.parse_type()]
            self.depth -= 1
            return FunctionType(tuple(inputs), tuple(results))
        raise self.error(f"unknown type {token!r}", self.at - 1)

    def attribute_dictionary(self, attributes: dict[str, Any]) -> None:
        self.expect("{")
        while not self.take("}"):
            at = self.at
            token = self.next()
            key = self.string(token) if token.startswith('"') else token
            if not token.startswith('"') and not (token[0].isalpha() or token[0] == "_"):
                raise self.error("expected the name of an attribute", at)
            if key in attributes:
                raise self.error(f"attribute {key} is given twice", at)
            attributes[key] = self.attribute() if self.take("=") else None
            if not self.take(","):
                self.expect("}")
                break

    def attribute(self) -> Any:
        at = self.at
        token = self.next()
        first = token[0]
        if first == '"':
            return self.string(token)
        if first.isdigit() or (first == "-" and token != "->"):
            return self.number(token, at)
        if token == "[":
            self.enter()
            items = []
            while not self.take("]"):
                items.append(self.attribute())
                if not self.take(","):
                    self.expect("]")
                    break
            self.depth -= 1
            return tuple(items)
        if token in ("true", "false"):
            return token == "true"
        if token == "unit":
            return None
        if token in _DTYPES:
            return _DTYPES[token]
        if token.startswith(("tensor<", "!moec.tensor<")) or token == "(":
            self.at -= 1
            return self.parse_type()
        if first == "@":
            return SymbolReference(self.string(token[1:]) if token[1] == '"' else token[1:])
        if first == "#":
            return self.dialect_attribute(token, at)
        raise self.error(f"unexpected {token!r} where an attribute stands", at)

    def count(self, digits: str, what: str) -> int:
        """The token just taken as a small number."""
        if not digits.isdigit() or len(digits) > 9:
            raise self.error(f"expected {what}", self.at - 1)
        return int(digits)

    def number(self, token: str, at: int) -> int | float:
        if self.take(":"):
            kind = self.next()
            if kind == "f64" and token.startswith("0x"):
                if len(token) > 18:
                    raise self.error("the bits are too many for f64", at)
                return float(struct.unpack("<d", int(token, 16).to_bytes(8, "little"))[0])
            if kind == "f64":
                return self.float_of(token, at)
            if kind != "i64":
                raise self.error(f"numbers are i64 or f64, not {kind}", self.at - 1)
        if "." in token:
            return self.float_of(token, at)
        if len(token) > MAX_INTEGER_DIGITS:
            raise self.error("the integer is too large", at)
        return int(token, 16) if token.startswith("0x") else int(token)

    def float_of(self, token: str, at: int) -> float:
        value = math.inf if token.startswith("0x") else float(token)
        if math.isinf(value):
            raise self.error("the number is too large for f64", at)
        return value

    def dialect_attribute(self, token: str, at: int) -> Any:
        if token.startswith("#moec.dim<"):
            try:
                return parse_dim(token[10:-1])
            except (ValueError, ZeroDivisionError) as error:
                raise self.error(str(error), at) from None
        if token.startswith("#moec.dense<"):
            digits = token[13:-2]
            if len(digits) % 2:
                raise self.error("a dense constant needs an even number of digits", at)
            return DenseConstant(bytes.fromhex(digits))
        mnemonic = token[1:]
        if mnemonic in ENUMS:
            return self.enum_member(ENUMS[mnemonic])
        if mnemonic not in STRUCTS:
            raise self.error(f"unknown attribute {token}", at)
        self.enter()
        values: dict[str, Any] = {}
        self.expect("<")
        while not self.take(">"):
            name = self.next()
            self.expect("=")
            values[name] = self.attribute()
            if not self.take(","):
                self.expect(">")
                break
        self.depth -= 1
        try:
            return STRUCTS[mnemonic](**values)
        except (TypeError, ValueError) as error:
            raise self.error(f"{token}: {error}", at) from None

    def enum_member(self, kind: type[Enum]) -> Enum:
        self.expect("<")
        at = self.at
        text = self.next()
        self.expect(">")
        for member in kind:
            if member.value == text:
                return member
        raise self.error(f"{text!r} is none of {', '.join(str(member.value) for member in kind)}", at)

    def parse_location(self) -> Location:
        self.at += 1
        self.expect("(")
        token = self.next()
        if token == "unknown":
            self.expect(")")
            return UNKNOWN
        if not token.startswith('"'):
            raise self.error("expected a location", self.at - 1)
        text = self.string(token)
        if self.take("("):
            location = self.file_position(self.string(self.next()), text)
            self.expect(")")
        elif self.tokens[self.at] == ":":
            location = self.file_position(text, "")
        else:
            location = Location(name=text)
        self.expect(")")
        return location

    def file_position(self, file: str, name: str) -> Location:
        numbers = []
        for _ in range(2):
            self.expect(":")
            digits = self.next()
            numbers.append(self.count(digits, "a line or column"))
        return Location(name, file, numbers[0], numbers[1])

    def string(self, token: str) -> str:
        if not token.startswith('"'):
            raise self.error("expected a string", self.at - 1)
        if "\\" not in token:
            return token[1:-1]
        raw = bytearray()
        end = 0
        body = token[1:-1]
        for match in _ESCAPE.finditer(body):
            raw += body[end : match.start()].encode()
            code = match.group(1)
            raw += {"n": b"\n", "t": b"\t", '"': b'"', "\\": b"\\"}.get(code) or bytes.fromhex(code)
            end = match.end()
        raw += body[end:].encode()
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise self.error("the string is not UTF-8", self.at - 1) from None
