"""The errors that moec reports to people: what happened, where, and what to do. Each class has one exit code."""

from __future__ import annotations


class MoecError(Exception):
    """Base class of every error that moec reports on purpose.

    `message` says what is wrong, `where` names the file, tensor, operation or line, `hint` says what to do about it.
    `str()` joins the three into one paragraph. `exit_code` is what the command line returns.
    """

    exit_code: int = 1

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = _sentence(self.message)
        if self.where:
            text += f" Where: {_sentence(self.where)}"
        if self.hint:
            text += f" What to do: {_sentence(self.hint)}"
        return text

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.where, self.hint)


class UsageError(MoecError):
    """The command or the call is wrong: an unknown option, a missing file, an output folder that exists."""

    exit_code = 2


class UnsupportedModelError(MoecError):
    """The model is well formed, but it is not one that moec can compile, or it contradicts its own configuration."""

    exit_code = 3


class VerificationError(MoecError):
    """A result does not match what it must match: an artifact its source, a stored file its digest, IR its rules."""

    exit_code = 4


class ResourceError(MoecError):
    """Memory, disk or another resource of the machine ran out."""

    exit_code = 5


class UnsafeInputError(MoecError):
    """The input is malformed or could do harm: a cut file, a path that leaves its folder, pickled code."""

    exit_code = 6


def _sentence(text: str) -> str:
    """`text` on one line, closed by a full stop unless it already ends with punctuation."""
    line = " ".join(text.split())
    return line if line.endswith((".", "!", "?", ":")) else f"{line}."


def _rebuild(error_class: type[MoecError], message: str, where: str, hint: str) -> MoecError:
    return error_class(message, where=where, hint=hint)
