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
