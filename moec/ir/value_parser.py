"""Reads types, attributes and locations. The text of a type is one token and is parsed once per distinct text."""

from __future__ import annotations

import math
import re
import struct
from enum import Enum
from functools import lru_cache
from typing import Any

from moec.ir.attributes import ENUMS, STRUCTS, DenseConstant, SymbolReference
from moec.ir.dimensions import parse_dim
from moec.ir.lexer import TokenStream
from moec.ir.location import UNKNOWN, Location
from moec.ir.types import DType, FunctionType, TensorType, Type

MAX_SIZE = 2**63 - 1
MAX_INTEGER_DIGITS = 40
_DTYPES = {dtype.value: dtype for dtype in DType}
_ESCAPE = re.compile(r'\\([0-9A-Fa-f]{2}|[nt"\\])')


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
            raise ValueError(f"malformed type {text[:200]}")
        inside = match.group(1).strip()
        shape = [parse_dim(size.strip()) for size in inside.split(",")] if inside else []
        element = match.group(2)
    if element.strip() not in _DTYPES:
        raise ValueError(f"unknown element type {element[:40]!r} in {text[:200]}")
    if not all(0 <= size <= MAX_SIZE for size in shape if isinstance(size, int)):
        raise ValueError(f"a size is not within 0..2**63-1 in {text[:200]}")
    return TensorType(tuple(shape), _DTYPES[element.strip()])


class ValueParser(TokenStream):
    """The part of the parser that reads what operations consist of."""

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
