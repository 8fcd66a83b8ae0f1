"""Cuts the text of IR into tokens, all at once by one regular expression, and knows where each one stands."""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import cached_property

from moec.errors import UsageError

MAX_DEPTH = 200
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


class ParseError(UsageError):
    """The text is malformed. `line` and `column`, from 1, are where."""

    line = 0
    column = 0


def _is_wrong(token: str) -> bool:
    """Whether the token is one of the last alternatives of the lexer."""
    if len(token) == 1:
        return not (token in _PUNCTUATION or token.isalnum() or token == "_")
    return token.endswith("\n")


class TokenStream:
    """The tokens of a text, the position of the next one, and how deep the parser is in nested text."""

    def __init__(self, text: str, file: str) -> None:
        """Raises ParseError where a piece of the text is no token."""
        # the line end makes an unterminated string the only token that ends in one
        self.text, self.file = f"{text}\n", file
        self.tokens: list[str] = _TOKENS.findall(self.text)
        while len(self.tokens) > 1 and not self.tokens[-2]:
            self.tokens.pop()
        self.at = 0
        self.depth = 0
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

    def error(self, message: str, at: int | None = None) -> ParseError:
        """The error `message` at a token, by default the next one."""
        line, column = self.position(self.at if at is None else at)
        start = self.line_starts[line - 1]
        shown = self.text[start : self.text.index("\n", start)]
        piece = shown[max(0, column - 60) : column + 60]
        error = ParseError(message, where=f"{self.file or '<text>'}:{line}:{column}: {piece.strip()}")
        error.line, error.column = line, column
        return error

    def position(self, at: int) -> tuple[int, int]:
        """Line and column of a token, from 1."""
        offset = min(self.starts[at], len(self.text) - 1)
        line = bisect_right(self.line_starts, offset)
        return line, offset - self.line_starts[line - 1] + 1

    def take(self, token: str) -> bool:
        """Whether the next token is `token`, which is then consumed."""
        if self.tokens[self.at] == token:
            self.at += 1
            return True
        return False

    def expect(self, token: str) -> None:
        """Consumes `token`; raises ParseError where another one stands."""
        if self.tokens[self.at] != token:
            found = self.tokens[self.at]
            raise self.error(f"expected {token!r}, found {found!r}" if found else f"expected {token!r} before the end")
        self.at += 1

    def next(self) -> str:
        """Consumes the next token; raises ParseError at the end."""
        token = self.tokens[self.at]
        if not token:
            raise self.error("the text ends early")
        self.at += 1
        return token

    def enter(self) -> None:
        """Goes one level deeper, so that deep nesting ends in a ParseError and not in a full stack."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error(f"nested deeper than {MAX_DEPTH} levels")
