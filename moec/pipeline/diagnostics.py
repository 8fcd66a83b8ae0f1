"""`--verify-diagnostics`: errors are compared with what comments in the text expect.

    // expected-error @+1 {{part of the message}}

A comment expects an error on its own line, on the line `@+N`, `@-N`, `@below` or `@above` it, or anywhere: `@unknown`.
Reading and verifying stop at the first error, so a piece of text has at most one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from moec.errors import MoecError, VerificationError
from moec.ir.parser import ParseError
from moec.ir.verifier import VerifyError

_EXPECTED = re.compile(r"//.*?expected-error\s*(?:@([+-]\d+|above|below|unknown))?\s*\{\{(.*?)\}\}")


@dataclass(frozen=True)
class Expectation:
    """A part of a message, and its line (0: any)."""

    text: str
    line: int


def check_diagnostics(text: str, file: str, first_line: int, run: Callable[[], object]) -> None:
    """Runs and compares; `first_line` is the number of lines of the file before `text`.

    Raises:
        VerificationError: an error that was not expected, or none where one was.
    """
    expected = list(expectations(text, first_line))
    try:
        run()
    except MoecError as error:
        line = error_line(error)
        if not any(item.text in error.message and item.line in (0, line) for item in expected):
            raise VerificationError(f"unexpected error: {error.message}", where=f"{file}:{line}") from error
        expected = [item for item in expected if item.text not in error.message]
    for item in expected:
        raise VerificationError(
            f"expected the error {item.text!r}, which was not reported", where=f"{file}:{item.line}"
        )


def expectations(text: str, first_line: int) -> list[Expectation]:
    """The expectations of a piece of text."""
    found = []
    for number, line in enumerate(text.split("\n"), first_line + 1):
        for match in _EXPECTED.finditer(line):
            offset = match.group(1) or "+0"
            target = {"above": number - 1, "below": number + 1, "unknown": 0}.get(offset)
            found.append(Expectation(match.group(2), number + int(offset) if target is None else target))
    return found


def error_line(error: MoecError) -> int:
    """The line of the text that an error is about; 0 where it is about none."""
    if isinstance(error, ParseError):
        return error.line
    cause = error if isinstance(error, VerifyError) else error.__cause__
    return cause.op.location.line if isinstance(cause, VerifyError) and cause.op is not None else 0
