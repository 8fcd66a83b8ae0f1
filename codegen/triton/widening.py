"""Brings two matrices into one format without a change of any number, as the kernels of gate and up need it."""

from __future__ import annotations

import math

import torch

from moec.codegen.triton.formats import FEWEST_COLUMNS
from moec.codegen.triton.packing import CodedMatrix
from moec.codegen.triton.spec import FLOAT, MatrixFormat


def common_format(one: CodedMatrix, other: CodedMatrix) -> tuple[CodedMatrix, CodedMatrix]:
    """The same numbers in one format: codes of enough bits, or floats where one is floats or has two levels."""
    formats = (one.format, other.format)
    if not all(item.packed for item in formats) or any(item.two_levels for item in formats):
        return _as_floats(one), _as_floats(other)
    groups = [item.scale_columns for item in formats if item.scale_columns]
    group = math.gcd(*groups) if groups else 0
    zeros = any(item.zero_points for item in formats)
    signed = MatrixFormat(8, 128, group, zeros)
    if group and group < FEWEST_COLUMNS:
        return _as_floats(one), _as_floats(other)
    return _widened(one, signed), _widened(other, signed)


def _widened(matrix: CodedMatrix, wanted: MatrixFormat) -> CodedMatrix:
    item = matrix.format
    values = matrix.values.to(torch.int16) + (wanted.middle - item.middle)
    columns = matrix.values.shape[1]
    count = -(-columns // wanted.scale_columns) if wanted.scale_columns else 1
    assert matrix.scales is not None
    repeats = (
        (item.scale_columns or wanted.scale_columns * count) // wanted.scale_columns if wanted.scale_columns else 1
    )
    scales = matrix.scales.repeat_interleave(repeats, dim=1)[:, :count]
    zeros = None
    if wanted.zero_points:
        given = torch.zeros_like(matrix.scales) if matrix.zeros is None else matrix.zeros
        zeros = given.repeat_interleave(repeats, dim=1)[:, :count]
    return CodedMatrix(wanted, values.to(torch.uint8), scales, zeros, matrix.shared)


def _as_floats(matrix: CodedMatrix) -> CodedMatrix:
    item = matrix.format
    if not item.packed:
        return matrix
    assert matrix.scales is not None
    columns = matrix.values.shape[1]
    width = item.scale_columns or columns

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(width, dim=1)[:, :columns]

    codes = matrix.values.float() - item.middle
    if matrix.zeros is None:
        return CodedMatrix(FLOAT, codes * spread(matrix.scales), shared=matrix.shared)
    if item.two_levels:
        values = codes * spread(matrix.scales) + codes.abs() * spread(matrix.zeros)
    else:
        values = (codes - spread(matrix.zeros)) * spread(matrix.scales)
    return CodedMatrix(FLOAT, values, shared=matrix.shared)
