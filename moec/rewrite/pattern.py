"""Patterns: typed functions that replace one operation, and the `Rewriter` through which they change the graph.

    @rewrite(RMSNormOp)
    def drop_unit_offset(op: RMSNormOp, rewriter: Rewriter) -> bool:
        \"\"\"rms_norm(x) + 0 ==> rms_norm(x)\"\"\"
        if op.weight is None:
            return rewriter.refuse(op, "there is no weight")
        ...
        return True

A pattern gives True if it changed something. It changes operations only through the rewriter, or in place followed by
`rewriter.notify(op)`, so that the driver visits what was affected.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, overload

from moec.errors import MoecError
from moec.ir.location import UNKNOWN, Location
from moec.ir.operation import Operation, Value

OpT = TypeVar("OpT", bound=Operation)


class RewriteError(MoecError):
    """A pattern broke its contract, or a set of patterns does not come to an end."""


@dataclass(frozen=True)
class Refusal:
    """Why a pattern, or a pass, left an operation as it was."""

    pattern: str
    operation: str
    location: Location
    reason: str

    def __str__(self) -> str:
        return f"{self.location}: {self.pattern} refused {self.operation}: {self.reason}"


@dataclass(frozen=True)
class RewritePattern:
    """A function with the kinds of operations it may be tried on.

    `roots` are operation classes (`Operation` itself stands for any operation, `AtenOp` for all of its dialect) or
    operation names. Among the patterns of one operation the greatest `benefit` comes first, then the order in which
    they were given.
    """

    function: Callable[[Any, Rewriter], bool]
    roots: tuple[type[Operation] | str, ...]
    benefit: int = 1

    @property
    def name(self) -> str:
        """The function's name, with dashes."""
        return self.function.__name__.strip("_").replace("_", "-")

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def matches(self, op: Operation) -> bool:
        """Whether `op` is of one of the kinds that the pattern is for."""
        return any(op.name == root if isinstance(root, str) else isinstance(op, root) for root in self.roots)

    def __call__(self, op: Operation, rewriter: Rewriter) -> bool:
        return self.function(op, rewriter)


@overload
def rewrite(*roots: type[OpT], benefit: int = 1) -> Callable[[Callable[[OpT, Rewriter], bool]], RewritePattern]: ...
@overload
def rewrite(
    *roots: type[Operation] | str, benefit: int = 1
) -> Callable[[Callable[[Any, Rewriter], bool]], RewritePattern]: ...
def rewrite(
    *roots: type[Operation] | str, benefit: int = 1
) -> Callable[[Callable[[Any, Rewriter], bool]], RewritePattern]:
    """Makes a pattern of a function; `roots` are operation classes or names such as `aten.mul.Tensor`."""
    if not roots:
        raise TypeError("a pattern needs at least one kind of operation")

    def make(function: Callable[[Any, Rewriter], bool]) -> RewritePattern:
        return RewritePattern(function, roots, benefit)

    return make


class Listener(Protocol):
    """What a driver wants to know of each change."""

    def changed(self, op: Operation) -> None:
        """`op` was inserted, or its operands or attributes changed."""

    def erasing(self, op: Operation) -> None:
        """`op` is about to be erased."""


class Rewriter:
    """Changes the graph around one operation, the `root` of a match, and tells the driver."""

    def __init__(self, root: Operation, listener: Listener, pattern: str = "") -> None:
        self.root = root
        self.listener = listener
        self.pattern = pattern
        self.modified = False
        self.refusals: list[tuple[Operation, Refusal]] = []
        self._erased = False

    def insert(self, op: OpT, before: Operation | None = None) -> OpT:
        """Puts a new operation before the root (or before another operation) and gives it back.

        An operation without a location gets the root's.
        """
        if op.parent is not None:
            raise RewriteError(f"the pattern {self.pattern} inserts {op.name} twice", where=str(op.location))
        if self._erased and before is None:
            raise RewriteError(f"the pattern {self.pattern} inserts {op.name} after it erased the matched operation")
        anchor = self.root if before is None else before
        if op.location is UNKNOWN:
            op.location = self.root.location
        op.insert_before(anchor)
        self.modified = True
        for nested in op.walk():
            self.listener.changed(nested)
        return op

    def replace(self, op: Operation, values: Value | Sequence[Value]) -> None:
        """Makes users of `op` read `values`, one for each result, then erases `op`.

        Raises:
            RewriteError: a number or type of values differs from the results'.
        """
        new = [values] if isinstance(values, Value) else list(values)
        if [value.type for value in new] != [result.type for result in op.results]:
            given = ", ".join(str(value.type) for value in new)
            wanted = ", ".join(str(result.type) for result in op.results)
            raise RewriteError(
                f"the pattern {self.pattern} replaces the results ({wanted}) of {op.name} by ({given})",
                where=f"{op.location}: {op!r}",
                hint="a replacement has the types of what it replaces; insert a cast or a view",
            )
        self.modified = True
        for result, value in zip(op.results, new, strict=True):
            users = result.users
            result.replace_all_uses_with(value)
            for user in users:
                self.listener.changed(user)
        self.erase(op)

    def replace_with(self, op: Operation, new: Operation) -> None:
        """Inserts `new` before the root and replaces `op` by its results."""
        self.insert(new)
        self.replace(op, new.results)

    def erase(self, op: Operation) -> None:
        """Erases an operation that has no uses left."""
        if op.has_uses:
            raise RewriteError(f"the pattern {self.pattern} erases {op.name}, which is in use", where=f"{op!r}")
        self.modified = True
        self._erased = self._erased or op is self.root
        self.listener.erasing(op)
        op.erase()

    def notify(self, op: Operation) -> None:
        """Says that operands or attributes of `op` were changed in place."""
        self.modified = True
        self.listener.changed(op)

    def refuse(self, op: Operation, reason: str) -> bool:
        """Records why the pattern does not apply to `op`; gives False, so that a pattern can return it."""
        self.refusals.append((op, Refusal(self.pattern, op.name, op.location, reason)))
        return False
