"""One expert of a stack, as an expression that reads that expert alone."""

from __future__ import annotations

from moec.weights.context import WeightContext
from moec.weights.expression import Cast, Concat, Expression, Fp8Block, Permute, Reshape, Slice, Stack, Transpose


def expert_of(stack: Expression, index: int, weights: WeightContext) -> Expression:
    """Row `index` of the leading axis of `stack`, pushed down to the tensors that hold it.

    Where one tensor of a file is the whole expert, the result is that reference, so its bytes can be used in place.
    """
    match stack:
        case Stack(0, parts):
            return parts[index]
        case Cast(operand, dtype):
            return Cast(expert_of(operand, index, weights), dtype)
        case Concat(dim, parts) if dim > 0:
            return Concat(dim - 1, tuple(expert_of(part, index, weights) for part in parts))
        case Stack(dim, parts):
            return Stack(dim - 1, tuple(expert_of(part, index, weights) for part in parts))
        case Concat(_, parts):
            for part in parts:
                size = weights.shape_dtype(part)[0][0]
                if index < size:
                    return expert_of(part, index, weights)
                index -= size
        case Transpose(operand, first, second) if min(first, second) > 0:
            return Transpose(expert_of(operand, index, weights), first - 1, second - 1)
        case Permute(operand, (0, *rest)):
            return Permute(expert_of(operand, index, weights), tuple(axis - 1 for axis in rest))
        case Slice(operand, dim, start, stop, step) if dim > 0:
            return Slice(expert_of(operand, index, weights), dim - 1, start, stop, step)
        case Slice(operand, _, start, _, step):
            return expert_of(operand, start + index * step, weights)
        case Fp8Block(weight, scale, rows, columns) if len(weights.shape_dtype(weight)[0]) > 2:
            return Fp8Block(expert_of(weight, index, weights), expert_of(scale, index, weights), rows, columns)
    shape = weights.shape_dtype(stack)[0]
    return Reshape(Slice(stack, 0, index, index + 1, 1), shape[1:])


def transposed(expression: Expression) -> Expression:
    """A matrix transposed; twice is none."""
    if isinstance(expression, Transpose) and {expression.first, expression.second} == {0, 1}:
        return expression.operand
    return Transpose(expression, 0, 1)
