"""From the matrices of experts to the formats that kernels read, or a refusal with the reason."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from moec.codegen.triton.packing import CodedMatrix
from moec.codegen.triton.spec import FLOAT, PLANE_BLOCK, MatrixFormat
from moec.dialects.quant import Integer, Levels, Span, Ternary, TernaryDictionary, ZeroPoint
from moec.errors import UnsupportedModelError
from moec.experts import Dense, Matrix
from moec.experts.expert import Quantized
from moec.quantization.packing import unpack_bits

if TYPE_CHECKING:
    from moec.quantization.packed import Packed

FEWEST_COLUMNS = 16
"""Columns that one matrix instruction takes at least."""


def code_matrix(matrix: Matrix, where: str) -> CodedMatrix:
    """The matrix for kernels. Raises UnsupportedModelError for a kind or a format that they do not read."""
    if isinstance(matrix, Dense):
        return CodedMatrix(FLOAT, matrix.weight)
    if isinstance(matrix, Quantized):
        return _coded(matrix.packed, where)
    raise _refusal(f"matrices of experts that are {type(matrix).__name__.lower()}", where)


def _coded(packed: Packed, where: str) -> CodedMatrix:
    kind = packed.format
    scales = packed.scales.float()
    if isinstance(kind, Ternary | TernaryDictionary):
        # 0, lower, upper become 1, 0, 2: the middle is 1
        codes = torch.tensor([1, 0, 2], dtype=torch.uint8)[packed.integer_codes().long()]
        if kind.levels is Levels.EXTREMES:
            both = scales.expand(len(codes), -1)
            lower, upper = both[:, :1], both[:, 1:]
            return CodedMatrix(MatrixFormat(2, 1, two_levels=True), codes, (upper - lower) / 2, (upper + lower) / 2)
        group = kind.group if isinstance(kind, Ternary) and kind.span is Span.GROUP else 0
        return _with_scales(codes, 2, 1, scales, None, packed.columns, group, where)
    if not isinstance(kind, Integer):
        raise _refusal(f"weights in the format {type(kind).__name__}", where)
    codes = packed.integer_codes()
    group = kind.group if kind.span is Span.GROUP else 0
    if kind.bits == 1:
        if kind.zero_point is not ZeroPoint.MIDDLE:
            raise _refusal("signs with zero points", where)
        # both signs of half the scale, as trits that are never zero
        return _with_scales(codes * 2, 2, 1, scales / 2, None, packed.columns, group, where)
    bits = next(size for size in (2, 4, 8) if kind.bits <= size)
    middle = int(kind.middle)
    zeros = None
    if packed.zero_points is not None:
        given = packed.zero_points
        if kind.zero_point is ZeroPoint.INTEGER:
            given = unpack_bits(given, kind.bits, scales.shape[1])
        zeros = given.float() - middle
    return _with_scales(codes, bits, middle, scales, zeros, packed.columns, group, where)


def _with_scales(
    codes: torch.Tensor,
    bits: int,
    middle: int,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    columns: int,
    group: int,
    where: str,
) -> CodedMatrix:
    """Scales for every row, and for groups that are equal parts of a block or whole blocks of columns."""
    rows = len(codes)
    found: list[torch.Tensor | None] = [scales, zeros]
    stored = 0
    if group and group < columns:
        stored = group if group % PLANE_BLOCK == 0 else math.gcd(group, PLANE_BLOCK)
        if stored < FEWEST_COLUMNS:
            raise _refusal(f"a scale for every {group} weights of {bits} bits", where)
        found = [None if item is None else item.repeat_interleave(group // stored, dim=1) for item in found]
    spread = [None if item is None else item.expand(rows, -1) for item in found]
    return CodedMatrix(MatrixFormat(bits, middle, stored, zeros is not None), codes, spread[0], spread[1])


def _refusal(what: str, where: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the Triton backend has no kernel for {what}",
        where=where,
        hint="integers of 1 to 8 bits and trits have kernels (quantize{bits=4}); or emit ONNX",
    )
