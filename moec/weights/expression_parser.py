"""Reads the text of weight expressions. The inverse of `format_expression`; hostile text ends in a UsageError."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import NoReturn

from moec.errors import UsageError
from moec.weights.expression import (
    Cast,
    Concat,
    Expression,
    Fp8Block,
    Mxfp4,
    Permute,
    Reference,
    Reshape,
    Slice,
    Stack,
    Stored,
    Transpose,
)
from moec.weights.tensor_spec import TEXT_TO_DTYPE

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<type>complex<f32>)
    | (?P<word>(?:[A-Za-z0-9_./-]|\{[0-9:,]+\})+)
    | (?P<quoted>"(?:[^"\\]|\\.)*")
    | (?P<mark>[(),])
    )""",
    re.VERBOSE,
)
_BRACES = re.compile(r"\{([0-9:,]+)\}")
_MAXIMUM_DEPTH = 64
_MAXIMUM_EXPRESSIONS = 1 << 20
_MAXIMUM_NUMBER_DIGITS = 19


@lru_cache(maxsize=512)
def parse_expression(text: str) -> Expression:
    """The expression that `text` describes. Raises UsageError, with the position, when it describes none."""
    parser = _Parser(text)
    result = parser.expression(0)
    if parser.peek():
        parser.fail(f"unexpected {parser.peek()!r} after the end")
    return result


class _Parser:
    """Recursive descent over the tokens. `numbers` holds the value that braces stand for while a list is expanded."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, int]] = []
        self.at = 0
        self.braces: list[str] | None = None
        self.number = 0
        self.budget = _MAXIMUM_EXPRESSIONS
        position = 0
        end = len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                self.at = len(self.tokens)
                self.tokens.append((text[position], position))
                self.fail("unexpected character")
            self.tokens.append((match[0].strip(), match.start(match.lastgroup or 0)))
            position = match.end()

    def fail(self, problem: str) -> NoReturn:
        position = self.tokens[self.at][1] if self.at < len(self.tokens) else len(self.text)
        before, after = self.text[max(0, position - 40) : position], self.text[position : position + 40]
        raise UsageError(
            f"the weight expression is malformed: {problem}",
            where=f"character {position}, at the arrow in `{before}-->{after}`",
            hint="correct the `source` of the weight",
        )

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead][0] if self.at + ahead < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            self.fail(f"expected {expected!r}" if expected else "it ends too early")
        self.at += 1
        return token

    def expression(self, depth: int) -> Expression:
        if depth > _MAXIMUM_DEPTH:
            self.fail(f"it is nested deeper than {_MAXIMUM_DEPTH}")
        self.budget -= 1
        if self.budget < 0:
            self.fail(f"it stands for more than {_MAXIMUM_EXPRESSIONS} tensors")
        token = self.peek()
        if not token or token in "(),":
            self.fail("expected a tensor name or an operation")
        if self.peek(1) == "(":
            build = _OPERATIONS.get(token)
            if build is None:
                self.fail(f"there is no operation {token!r}; there are {', '.join(_OPERATIONS)}")
            self.at += 2
            result = build(self, depth + 1)
            self.take(")")
            return result
        return Reference(self.name())

    def name(self) -> str:
        token = self.peek()
        if token.startswith('"'):
            try:
                name = json.loads(token)
            except ValueError:
                self.fail("the quoted name is malformed")
            self.at += 1
            return str(name)
        if token.isdigit():
            self.fail("expected a tensor name, not a number")
        if "{" in token:
            if self.braces is None:
                self.fail("braces are only allowed in the arguments of stack and concat")
            self.braces += _BRACES.findall(token)
            token = _BRACES.sub(str(self.number), token)
        self.at += 1
        return token

    def comma_number(self) -> int:
        self.take(",")
        return self.integer()

    def integer(self) -> int:
        token = self.peek()
        if not (token.isascii() and token.isdigit()) or len(token) > _MAXIMUM_NUMBER_DIGITS:
            self.fail("expected a non-negative integer")
        self.at += 1
        return int(token)

    def comma_numbers(self) -> tuple[int, ...]:
        numbers = []
        while self.peek() == ",":
            numbers.append(self.comma_number())
        return tuple(numbers)

    def parts(self, depth: int) -> tuple[Expression, ...]:
        """The list of arguments after the dimension; an argument with braces is read once for each number."""
        outer = self.braces, self.number
        result: list[Expression] = []
        while self.peek() == ",":
            self.at += 1
            start = self.at
            self.braces, self.number = [], 0
            part = self.expression(depth)
            spellings = set(self.braces)
            if not spellings:
                result.append(part)
                continue
            if len(spellings) > 1:
                self.fail("all braces in one argument must be the same")
            for number in self._numbers(spellings.pop()):
                self.at, self.number = start, number
                result.append(self.expression(depth))
        self.braces, self.number = outer
        if not result:
            self.fail("it needs at least one tensor")
        return tuple(result)

    def _numbers(self, spelling: str) -> list[int]:
        numbers: list[int] = []
        for run in spelling.split(","):
            bounds = run.split(":")
            if len(bounds) > 2 or not all(0 < len(bound) <= 9 for bound in bounds):
                self.fail(f"the braces {{{spelling}}} are not a list of numbers and ranges start:stop")
            start = int(bounds[0])
            stop = int(bounds[1]) if len(bounds) == 2 else start + 1
            if stop <= start or len(numbers) + stop - start > _MAXIMUM_EXPRESSIONS:
                self.fail(f"the range {run} is empty or too long")
            numbers.extend(range(start, stop))
        return numbers


def _stack(parser: _Parser, depth: int) -> Expression:
    return Stack(parser.integer(), parser.parts(depth))


def _concat(parser: _Parser, depth: int) -> Expression:
    return Concat(parser.integer(), parser.parts(depth))


def _transpose(parser: _Parser, depth: int) -> Expression:
    return Transpose(parser.expression(depth), parser.comma_number(), parser.comma_number())


def _permute(parser: _Parser, depth: int) -> Expression:
    return Permute(parser.expression(depth), parser.comma_numbers())


def _slice(parser: _Parser, depth: int) -> Expression:
    operand = parser.expression(depth)
    dim, start, stop, step = (parser.comma_number() for _ in range(4))
    return Slice(operand, dim, start, stop, step)


def _reshape(parser: _Parser, depth: int) -> Expression:
    return Reshape(parser.expression(depth), parser.comma_numbers())


def _cast(parser: _Parser, depth: int) -> Expression:
    operand = parser.expression(depth)
    parser.take(",")
    dtype = TEXT_TO_DTYPE.get(parser.peek())
    if dtype is None:
        parser.fail(f"expected an element type, one of {', '.join(TEXT_TO_DTYPE)}")
    parser.at += 1
    return Cast(operand, dtype)


def _fp8_block(parser: _Parser, depth: int) -> Expression:
    weight = parser.expression(depth)
    parser.take(",")
    return Fp8Block(weight, parser.expression(depth), parser.comma_number(), parser.comma_number())


def _mxfp4(parser: _Parser, depth: int) -> Expression:
    blocks = parser.expression(depth)
    parser.take(",")
    return Mxfp4(blocks, parser.expression(depth))


def _stored(parser: _Parser, depth: int) -> Expression:
    if not re.fullmatch(r"[0-9a-f]{64}", parser.peek()):
        parser.fail("expected a digest of 64 hexadecimal digits")
    return Stored(parser.take())


_OPERATIONS: dict[str, Callable[[_Parser, int], Expression]] = {
    "stack": _stack,
    "concat": _concat,
    "transpose": _transpose,
    "permute": _permute,
    "slice": _slice,
    "reshape": _reshape,
    "cast": _cast,
    "fp8_block": _fp8_block,
    "mxfp4": _mxfp4,
    "stored": _stored,
}
