"""Reads the text that `printer` writes, and hand-written text of the same form."""

from __future__ import annotations

import gc
from importlib import import_module
from typing import Any

from moec.ir.lexer import ParseError
from moec.ir.location import UNKNOWN, Location
from moec.ir.operation import Block, Operation, Region, Value
from moec.ir.types import Type
from moec.ir.value_parser import ValueParser

__all__ = ["ParseError", "parse_module", "parse_operation"]


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


class _Parser(ValueParser):
    def __init__(self, text: str, file: str) -> None:
        super().__init__(text, file)
        self.scopes: list[dict[str, Value]] = [{}]
        # values that are used before their definition: placeholders by name, and the token of their first use
        self.forward: list[dict[str, tuple[Value, int]]] = [{}]

    def finish(self) -> None:
        if self.tokens[self.at]:
            raise self.error(f"unexpected {self.tokens[self.at]!r} after the end of the operation")
        self.report_undefined()

    def report_undefined(self) -> None:
        for name, (_, at) in self.forward[-1].items():
            raise self.error(f"undefined value {name}", at)

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
