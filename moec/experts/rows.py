"""Weight expressions for some rows of a tensor, as close to the tensors in files as possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moec.experts.expert import View
from moec.weights.expression import Cast, Concat, Expression, Permute, Reshape, Slice, Stack, Transpose


def rows_of(expression: Expression, rows: Sequence[int], count: int) -> Expression:
    """`expression[rows]` along dimension 0, which has `count` entries."""
    if list(rows) == list(range(count)):
        return expression
    match expression:
        case Stack(0, parts):
            return Stack(0, tuple(parts[row] for row in rows))
        case Stack(dim, parts):
            return Stack(dim, tuple(rows_of(part, rows, count) for part in parts))
        case Concat(dim, parts) if dim != 0:
            return Concat(dim, tuple(rows_of(part, rows, count) for part in parts))
        case Cast(operand, dtype):
            return Cast(rows_of(operand, rows, count), dtype)
        case Slice(operand, dim, start, stop, step) if dim != 0:
            return Slice(rows_of(operand, rows, count), dim, start, stop, step)
        case Transpose(operand, first, second) if 0 not in (first, second):
            return Transpose(rows_of(operand, rows, count), first, second)
        case Permute(operand, dims) if dims[0] == 0:
            return Permute(rows_of(operand, rows, count), dims)
    runs: list[list[int]] = []
    for row in rows:
        if runs and row == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([row, row + 1])
    parts = tuple(Slice(expression, 0, start, stop, 1) for start, stop in runs)
    return parts[0] if len(parts) == 1 else Concat(0, parts)


def one_row(expression: Expression, row: int, shape: Sequence[int]) -> Expression:
    """`expression[row]`, of shape `shape`."""
    match expression:
        case Stack(0, parts):
            return parts[row]
        case Stack(dim, parts):
            inner = (*shape[: dim - 1], *shape[dim:])
            return Stack(dim - 1, tuple(one_row(part, row, inner) for part in parts))
        case Concat(dim, parts) if dim != 0 and all(isinstance(part, Stack) and part.dim == 0 for part in parts):
            return Concat(dim - 1, tuple(part.operands[row] for part in parts))
        case Cast(operand, dtype):
            return Cast(one_row(operand, row, shape), dtype)
    return Reshape(Slice(expression, 0, row, row + 1, 1), tuple(shape))


def seen_through(
    expression: Expression, view: View, first: int, shape_of: Callable[[Expression], Sequence[int]]
) -> Expression:
    """`expression` with its dimensions from `first` on seen through `view`; `shape_of` gives shapes of expressions."""
    for axis, (start, stop, step) in enumerate(zip(view.starts, view.stops, view.steps, strict=True)):
        expression = _cut(expression, first + axis, range(start, stop, step), shape_of)
    return Transpose(expression, first, first + 1) if view.transposed else expression


def _cut(expression: Expression, dim: int, rows: range, shape_of: Callable[[Expression], Sequence[int]]) -> Expression:
    """Some entries along `dim`; of a concatenation only the part that has them, where one has them all."""
    if isinstance(expression, Concat) and expression.dim == dim:
        before = 0
        for part in expression.parts:
            size = shape_of(part)[dim]
            if before <= rows[0] and rows[-1] < before + size:
                return _cut(part, dim, range(rows[0] - before, rows[-1] - before + 1, rows.step), shape_of)
            before += size
    if rows == range(shape_of(expression)[dim]):
        return expression
    return Slice(expression, dim, rows.start, rows.stop, rows.step)
