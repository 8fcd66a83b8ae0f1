"""What weight expressions mean: shape and element type without reading, values with reading only what is asked for.

A region (one range per dimension) is pushed down through the expression to the files: `stack(0, ...)` for one expert
reads one expert, a row of a transposed matrix reads one column.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

import torch

from moec.errors import UsageError
from moec.weights.dequantization import dequantize_fp8_block, dequantize_mxfp4
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
from moec.weights.safetensors_file import Region
from moec.weights.tensor_spec import DTYPE_TO_TEXT, TensorSpec

# What has to be held beside the result of a cast, unless one row is larger.
_PART_BYTES = 32 << 20
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class TensorSource(Protocol):
    """Where the leaves of expressions come from. Each method raises a MoecError when there is no such tensor."""

    def leaf_spec(self, leaf: Reference | Stored) -> TensorSpec:
        """Shape and element type, without reading the tensor."""

    def leaf_part(self, leaf: Reference | Stored, region: Region, out: torch.Tensor | None) -> torch.Tensor:
        """The part `region`, copied into `out` (of the tensor's type, any strides) or into a new dense tensor."""

    def leaf_digest(self, leaf: Reference | Stored) -> str:
        """SHA-256 of shape, element type and bytes."""


def full_region(spec: TensorSpec) -> Region:
    """The region that covers everything."""
    return tuple(range(size) for size in spec.shape)


def _fail(expression: Expression, problem: str) -> NoReturn:
    text = str(expression)
    raise UsageError(
        f"the weight expression is wrong: {problem}",
        where=text if len(text) <= 300 else f"{text[:300]}...",
        hint="correct the `source` of the weight",
    )


def _check_dim(expression: Expression, dim: int, rank: int) -> None:
    if not 0 <= dim < rank:
        _fail(expression, f"there is no dimension {dim} among {rank}")


def _infer_one(expression: Expression, operands: list[TensorSpec], source: TensorSource) -> TensorSpec:
    match expression:
        case Reference() | Stored():
            return source.leaf_spec(expression)
        case Stack(dim, _):
            first = operands[0]
            _check_dim(expression, dim, len(first.shape) + 1)
            for other in operands[1:]:
                if other != first:
                    _fail(expression, f"stacked tensors must be alike, but there are {first} and {other}")
            return TensorSpec((*first.shape[:dim], len(operands), *first.shape[dim:]), first.dtype)
        case Concat(dim, _):
            first = operands[0]
            _check_dim(expression, dim, len(first.shape))
            for other in operands[1:]:
                same = other.shape[:dim] == first.shape[:dim] and other.shape[dim + 1 :] == first.shape[dim + 1 :]
                if other.dtype != first.dtype or len(other.shape) != len(first.shape) or not same:
                    _fail(expression, f"{first} and {other} cannot be concatenated along dimension {dim}")
            size = sum(operand.shape[dim] for operand in operands)
            return TensorSpec((*first.shape[:dim], size, *first.shape[dim + 1 :]), first.dtype)
        case Transpose(_, one, other):
            shape = list(operands[0].shape)
            _check_dim(expression, one, len(shape))
            _check_dim(expression, other, len(shape))
            shape[one], shape[other] = shape[other], shape[one]
            return TensorSpec(tuple(shape), operands[0].dtype)
        case Permute(_, dims):
            if sorted(dims) != list(range(len(operands[0].shape))):
                _fail(expression, f"{dims} is not an order of the dimensions of {operands[0]}")
            return TensorSpec(tuple(operands[0].shape[dim] for dim in dims), operands[0].dtype)
        case Slice(_, dim, start, stop, step):
            shape = list(operands[0].shape)
            _check_dim(expression, dim, len(shape))
            if not start <= stop <= shape[dim] or step < 1:
                _fail(expression, f"{start}:{stop}:{step} is not a slice of {shape[dim]} elements")
            shape[dim] = len(range(start, stop, step))
            return TensorSpec(tuple(shape), operands[0].dtype)
        case Reshape(_, shape):
            result = TensorSpec(shape, operands[0].dtype)
            if result.elements != operands[0].elements:
                _fail(expression, f"{operands[0]} has {operands[0].elements} elements, the new shape {result.elements}")
            return result
        case Cast(_, dtype):
            return TensorSpec(operands[0].shape, dtype)
        case Fp8Block(_, _, rows, columns):
            return _infer_fp8_block(expression, operands[0], operands[1], rows, columns)
        case Mxfp4():
            return _infer_mxfp4(expression, operands[0], operands[1])
    raise TypeError(f"{type(expression).__name__} has no meaning")


def _infer_fp8_block(
    expression: Expression, weight: TensorSpec, scale: TensorSpec, rows: int, columns: int
) -> TensorSpec:
    if weight.dtype not in _FLOAT8 or not scale.dtype.is_floating_point:
        _fail(expression, f"it needs a float8 weight and floating-point scales, not {weight} and {scale}")
    if len(weight.shape) < 2 or rows < 1 or columns < 1:
        _fail(expression, f"{weight} cannot be cut into blocks of {rows} x {columns}")
    expected = (*weight.shape[:-2], -(-weight.shape[-2] // rows), -(-weight.shape[-1] // columns))
    if scale.shape != expected:
        _fail(
            expression, f"{weight} in blocks of {rows} x {columns} needs scales of shape {list(expected)}, not {scale}"
        )
    return TensorSpec(weight.shape, torch.float32)


def _infer_mxfp4(expression: Expression, blocks: TensorSpec, scales: TensorSpec) -> TensorSpec:
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        _fail(expression, f"it needs uint8 blocks and scales, not {blocks} and {scales}")
    if len(blocks.shape) != 4 or blocks.shape[:-1] != scales.shape:
        _fail(
            expression,
            f"blocks [experts, rows, groups, bytes] need scales [experts, rows, groups], not {blocks} and {scales}",
        )
    experts, rows, groups, packed = blocks.shape
    return TensorSpec((experts, groups * packed * 2, rows), torch.float32)


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Computes parts of expressions over `source`; `known` remembers shapes and types between calls."""

    source: TensorSource
    known: dict[Expression, TensorSpec] = field(default_factory=dict)

    def infer(self, expression: Expression) -> TensorSpec:
        """Shape and element type of `expression`. Raises UsageError when its parts do not fit together."""
        found = self.known.get(expression)
        if found is None:
            found = _infer_one(expression, [self.infer(operand) for operand in expression.operands], self.source)
            self.known[expression] = found
        return found

    def evaluate(self, expression: Expression, region: Region, out: torch.Tensor | None = None) -> torch.Tensor:
        """The part `region` of the value of `expression`, of shape [len(part) for part in region].

        It is written into `out` (of the expression's type, any strides) or into a new dense tensor.
        Raises UsageError for expressions that do not fit together, and whatever the source raises.
        """
        spec = self.infer(expression)
        match expression:
            case Reference() | Stored():
                return self.source.leaf_part(expression, region, out)
            case Slice(operand, dim, start, stop, step):
                wanted = region[dim]
                part = range(start, stop, step)[wanted.start : wanted.stop : wanted.step]
                return self.evaluate(operand, (*region[:dim], part, *region[dim + 1 :]), out)
        if out is None:
            out = torch.empty([len(part) for part in region], dtype=spec.dtype)
        match expression:
            case Stack(dim, parts):
                rest = region[:dim] + region[dim + 1 :]
                for position, chosen in enumerate(region[dim]):
                    self.evaluate(parts[chosen], rest, out.select(dim, position))
            case Concat():
                self._concat(expression, region, out)
            case Transpose(operand, one, other):
                swapped = list(region)
                swapped[one], swapped[other] = swapped[other], swapped[one]
                out.copy_(self.evaluate(operand, tuple(swapped)).transpose(one, other))
            case Permute(operand, dims):
                inner = tuple(region[dims.index(dim)] for dim in range(len(dims)))
                out.copy_(self.evaluate(operand, inner).permute(dims))
            case Reshape():
                out.copy_(self._reshape(expression, region, spec))
            case Cast(operand, _):
                for start, rows in _row_parts(region, self.infer(operand)):
                    target = out.narrow(0, start, len(rows[0])) if rows else out
                    target.copy_(self.evaluate(operand, rows))
            case Fp8Block():
                self._fp8_block(expression, region, out)
            case Mxfp4():
                out.copy_(self._mxfp4(expression, region))
            case _:
                raise TypeError(f"{type(expression).__name__} has no meaning")
        return out

    def _concat(self, expression: Concat, region: Region, out: torch.Tensor) -> None:
        dim = expression.dim
        wanted = region[dim]
        begin = done = 0
        for part in expression.parts:
            end = begin + self.infer(part).shape[dim]
            stop = max(done, min(len(wanted), -(-(end - wanted.start) // wanted.step)))
            chosen = wanted[done:stop]
            if chosen:
                local = range(chosen.start - begin, chosen.stop - begin, chosen.step)
                inner = (*region[:dim], local, *region[dim + 1 :])
                self.evaluate(part, inner, out.narrow(dim, done, len(chosen)))
            begin, done = end, stop

    def _reshape(self, expression: Reshape, region: Region, spec: TensorSpec) -> torch.Tensor:
        """Read the rows of the operand that cover the wanted rows, then cut. Both are contiguous runs of elements."""
        inner = self.infer(expression.operand)
        if not spec.shape or not inner.shape or not all(region):
            value = self.evaluate(expression.operand, full_region(inner)).reshape(spec.shape)
            return value[tuple(slice(part.start, part.stop, part.step) for part in region)]
        first, last = region[0][0], region[0][-1] + 1
        row, inner_row = spec.elements // spec.shape[0], inner.elements // inner.shape[0]
        inner_first, inner_last = first * row // inner_row, -(-last * row // inner_row)
        covering = (range(inner_first, inner_last), *full_region(inner)[1:])
        flat = self.evaluate(expression.operand, covering).reshape(-1)
        start = first * row - inner_first * inner_row
        rows = flat[start : start + (last - first) * row].reshape(last - first, *spec.shape[1:])
        rest = (slice(part.start, part.stop, part.step) for part in region[1:])
        return rows[(slice(0, None, region[0].step), *rest)]

    def _fp8_block(self, expression: Fp8Block, region: Region, out: torch.Tensor) -> None:
        rows, columns = region[-2:]
        row_blocks, row_indices = _blocks(rows, expression.block_rows)
        column_blocks, column_indices = _blocks(columns, expression.block_columns)
        weight = self.evaluate(expression.weight, region)
        scale = self.evaluate(expression.scale, (*region[:-2], row_blocks, column_blocks))
        dequantize_fp8_block(weight, scale, row_indices, column_indices, out)

    def _mxfp4(self, expression: Mxfp4, region: Region) -> torch.Tensor:
        experts, columns, rows = region
        packed = self.infer(expression.blocks).shape[-1]
        groups, _ = _blocks(columns, 2 * packed)
        blocks = self.evaluate(expression.blocks, (experts, rows, groups, range(packed)))
        scales = self.evaluate(expression.scales, (experts, rows, groups))
        offset = groups.start * 2 * packed
        values = dequantize_mxfp4(blocks, scales)
        return values[..., columns.start - offset : columns.stop - offset : columns.step].transpose(1, 2)


def _row_parts(region: Region, spec: TensorSpec) -> Iterator[tuple[int, Region]]:
    """Cut a region along dimension 0 into parts of about `_PART_BYTES`, each with the position of its first row."""
    if not region:
        yield 0, region
        return
    row_bytes = math.prod(len(part) for part in region[1:]) * spec.dtype.itemsize
    step = max(1, _PART_BYTES // max(row_bytes, 1))
    for start in range(0, len(region[0]), step):
        yield start, (region[0][start : start + step], *region[1:])


def _blocks(wanted: range, size: int) -> tuple[range, torch.Tensor]:
    """The blocks of `size` elements that cover `wanted`; for each wanted element its block, counted from the first."""
    if not wanted:
        return range(0), torch.empty(0, dtype=torch.int64)
    covering = range(wanted[0] // size, wanted[-1] // size + 1)
    return covering, torch.tensor(wanted, dtype=torch.int64) // size - covering.start


def expression_digest(expression: Expression, source: TensorSource) -> str:
    """SHA-256 of what `expression` computes from which contents; names and files do not matter.

    Equal digests mean equal values; one value may be written as different expressions with different digests.
    """
    match expression:
        case Reference() | Stored():
            return source.leaf_digest(expression)
        case Transpose(_, first, second):
            options: tuple[object, ...] = (first, second)
        case Slice(_, dim, start, stop, step):
            options = (dim, start, stop, step)
        case Permute(_, dims):
            options = dims
        case Reshape(_, shape):
            options = shape
        case Cast(_, dtype):
            options = (DTYPE_TO_TEXT[dtype],)
        case Stack(dim, _) | Concat(dim, _):
            options = (dim,)
        case Fp8Block(_, _, rows, columns):
            options = (rows, columns)
        case _:
            options = ()
    inner = [expression_digest(operand, source) for operand in expression.operands]
    text = f"moec expression 1 {type(expression).__name__} {options} {' '.join(inner)}"
    return hashlib.sha256(text.encode()).hexdigest()
