"""Checks a module: structure, dominance, and what each operation requires."""

from __future__ import annotations

from moec.errors import MoecError
from moec.ir.operation import BlockArgument, Operation, OpResult, Value


class VerifyError(MoecError):
    """The IR is invalid. The text shows the operation's location, itself and its neighbours, never the module."""

    exit_code = 2

    def __init__(self, message: str, op: Operation | None = None) -> None:
        where = ""
        if op is not None:
            where = f"{op.location}\n{_neighbourhood(op)}"
        super().__init__(message, where=where)
        self.op = op


def _neighbourhood(op: Operation) -> str:
    from moec.ir.printer import message_text

    lines = []
    for marker, shown in (("   ", op.prev), ("-> ", op), ("   ", op.next)):
        if shown is not None:
            text = message_text(shown)
            lines.append(marker + (text if len(text) <= 400 else text[:400] + " ..."))
    return "\n".join(lines)


def verify(op: Operation) -> None:
    """Verifies `op` and everything nested in it.

    Raises:
        VerifyError: a value is used before or outside its definition, a terminator is not last, or an operation's own
        rule fails.
    """
    _verify_operation(op, set())


def _closed_around(op: Operation, value: Value) -> Operation | None:
    """The isolated operation between the block of `value` and `op`; None where there is none."""
    home = (
        value.owner.parent if isinstance(value, OpResult) else value.block if isinstance(value, BlockArgument) else None
    )
    closed = None
    inner: Operation | None = op
    while inner is not None:
        if inner.parent is home:
            return closed
        inner = inner.parent_op
        if inner is not None and inner.isolated:
            closed = inner
    return None


def _verify_operation(op: Operation, visible: set[Value]) -> None:
    for index, value in enumerate(op._operands):
        if value not in visible:
            closed = _closed_around(op, value)
            if closed is not None:
                raise VerifyError(f"operand {index} of {op.name} is from outside of {closed.name}, which is closed", op)
            raise VerifyError(f"operand {index} of {op.name} does not dominate this use", op)
        if (op, index) not in value.uses:
            raise VerifyError(f"the use list of operand {index} of {op.name} lacks this use", op)
    op.verify_op()
    if op.isolated:
        visible = set()
    for region in op.regions:
        block = region.block
        defined: list[Value] = list(block.arguments)
        visible.update(block.arguments)
        previous: Operation | None = None
        for nested in block:
            if nested.parent is not block or nested.prev is not previous:
                raise VerifyError(f"{nested.name} is linked wrongly in its block", nested)
            if nested.terminator and nested.next is not None:
                raise VerifyError(f"the terminator {nested.name} must be the last operation of its block", nested)
            _verify_operation(nested, visible)
            visible.update(nested.results)
            defined.extend(nested.results)
            previous = nested
        visible.difference_update(defined)
