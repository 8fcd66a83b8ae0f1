"""One row of a stack, as an expression that reads that row alone."""

from __future__ import annotations

from moec.weights.context import WeightContext
from moec.weights.expression import Cast, Concat, Expression, Fp8Block, Permute, Reshape, Slice, Stack, Transpose


def row_of(stack: Expression, index: int, weights: WeightContext) -> Expression:
    """Row `index` of the leading axis of `stack`, pushed down to the tensors that hold it.

    Equal rows of different stacks get equal expressions. Where one tensor of a file is the whole row, the result is
    that reference, so its bytes can be used in place.
    """
    match stack:
        case Stack(0, parts):
            return parts[index]
        case Cast(operand, dtype):
            return Cast(row_of(operand, index, weights), dtype)
        case Concat(dim, parts) if dim > 0:
            return Concat(dim - 1, tuple(row_of(part, index, weights) for part in parts))
        case Stack(dim, parts):
            return Stack(dim - 1, tuple(row_of(part, index, weights) for part in parts))
        case Concat(_, parts):
            for part in parts:
                size = weights.shape_dtype(part)[0][0]
                if index < size:
                    return row_of(part, index, weights)
                index -= size
        case Transpose(operand, first, second) if min(first, second) > 0:
            return Transpose(row_of(operand, index, weights), first - 1, second - 1)
        case Permute(operand, (0, *rest)):
            return Permute(row_of(operand, index, weights), tuple(axis - 1 for axis in rest))
        case Slice(operand, dim, start, stop, step) if dim > 0:
            return Slice(row_of(operand, index, weights), dim - 1, start, stop, step)
        case Slice(operand, _, start, _, step):
            return row_of(operand, start + index * step, weights)
        case Fp8Block(weight, scale, rows, columns) if len(weights.shape_dtype(weight)[0]) > 2:
            return Fp8Block(row_of(weight, index, weights), row_of(scale, index, weights), rows, columns)
    shape = weights.shape_dtype(stack)[0]
    return Reshape(Slice(stack, 0, index, index + 1, 1), shape[1:])


def simplified(expression: Expression, weights: WeightContext) -> Expression:
    """The same tensor, so that a part of it has one expression whether it was cut out of the whole or not.

    A slice of a concatenation that lies in one of its parts is a slice of that part; slices that follow each other
    and make up a tensor are that tensor.
    """
    match expression:
        case Cast(operand, dtype):
            return Cast(simplified(operand, weights), dtype)
        case Transpose(operand, first, second):
            return Transpose(simplified(operand, weights), first, second)
        case Slice(operand, dim, start, stop, step):
            return _cut(simplified(operand, weights), dim, range(start, stop, step), weights)
        case Concat(dim, parts):
            return _joined(dim, tuple(simplified(part, weights) for part in parts), weights)
    return expression


def joined_parts(expression: Expression) -> tuple[Expression, ...]:
    """The tensors that `expression` joins, without casts; itself where it joins none."""
    while isinstance(expression, Cast):
        expression = expression.operand
    if isinstance(expression, Concat):
        return tuple(found for part in expression.parts for found in joined_parts(part))
    return (expression,)


def _cut(operand: Expression, dim: int, kept: range, weights: WeightContext) -> Expression:
    if isinstance(operand, Cast):
        return Cast(_cut(operand.operand, dim, kept, weights), operand.dtype)
    if isinstance(operand, Concat) and operand.dim == dim and kept:
        start = 0
        for part in operand.parts:
            size = weights.shape_dtype(part)[0][dim]
            if start <= kept[0] and kept[-1] < start + size:
                return _cut(part, dim, range(kept.start - start, kept.stop - start, kept.step), weights)
            start += size
    if kept == range(weights.shape_dtype(operand)[0][dim]):
        return operand
    return Slice(operand, dim, kept.start, kept.stop, kept.step)


def _joined(dim: int, parts: tuple[Expression, ...], weights: WeightContext) -> Expression:
    if all(isinstance(part, Cast) for part in parts):
        casts = [part for part in parts if isinstance(part, Cast)]
        if len({part.dtype for part in casts}) == 1:
            return Cast(_joined(dim, tuple(part.operand for part in casts), weights), casts[0].dtype)
    slices = [part for part in parts if isinstance(part, Slice) and (part.dim, part.step) == (dim, 1)]
    if len(slices) == len(parts) and all(part.operand == slices[0].operand for part in slices):
        ends = [0, *[part.stop for part in slices]]
        follow = [part.start for part in slices] == ends[:-1]
        if follow and ends[-1] == weights.shape_dtype(slices[0].operand)[0][dim]:
            return slices[0].operand
    return Concat(dim, parts)
