"""Lays the weights of a layer out as the kernels read them: a flat tensor for each format, and a table of offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from moec.codegen.triton.spec import FLOAT, PLANE_BLOCK, WIDTH_UNIT, Element, MatrixFormat, padded


class Column(IntEnum):
    """The columns of the table of experts, int64 [experts, 8]. Offsets count elements of the tensor of the format."""

    WIDTH = 0
    INPUT_FORMAT = 1
    INPUT_OFFSET = 2
    INPUT_SCALE_OFFSET = 3
    OUTPUT_FORMAT = 4
    OUTPUT_OFFSET = 5
    OUTPUT_SCALE_OFFSET = 6
    BIAS_OFFSET = 7


TABLE_COLUMNS = len(Column)


@dataclass(frozen=True)
class CodedMatrix:
    """A matrix [rows, columns] in a format: numbers, or codes u8 with scales f32 [rows, groups or 1].

    `zeros` is like the scales, in units of a code, where the format has zero points.
    """

    format: MatrixFormat
    values: torch.Tensor
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None

    def below(self, other: CodedMatrix) -> CodedMatrix:
        """The rows of this matrix above those of `other`, which has the same format."""
        parts = zip((self.values, self.scales, self.zeros), (other.values, other.scales, other.zeros), strict=True)
        joined = [None if one is None or two is None else torch.cat([one, two]) for one, two in parts]
        assert joined[0] is not None
        return CodedMatrix(self.format, joined[0], joined[1], joined[2])

    def extended(self, rows: int, columns: int) -> CodedMatrix:
        """With rows and columns of zeros behind its own."""
        item = self.format
        more = (0, columns - self.values.shape[1], 0, rows - self.values.shape[0])
        values = torch.nn.functional.pad(self.values, more, value=item.middle)
        if self.scales is None:
            return CodedMatrix(item, values)
        groups = columns // item.scale_columns if item.scale_columns else 1
        more = (0, groups - self.scales.shape[1], 0, more[3])
        scales = torch.nn.functional.pad(self.scales, more)
        return CodedMatrix(
            item, values, scales, None if self.zeros is None else torch.nn.functional.pad(self.zeros, more)
        )


@dataclass(frozen=True)
class CodedExpert:
    """One expert: its real width, the matrices of its two products, and biases [rows of the first, then H]."""

    width: int
    gate: CodedMatrix | None
    up: CodedMatrix
    down: CodedMatrix
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @property
    def padded_width(self) -> int:
        """The width that kernels compute."""
        return padded(self.width, self.down.format.column_unit)


@dataclass(frozen=True)
class PackedExperts:
    """The tensors of a layer's experts by name, the formats in the order of their numbers, and padded widths."""

    tensors: dict[str, torch.Tensor]
    input_formats: tuple[MatrixFormat, ...]
    output_formats: tuple[MatrixFormat, ...]
    widths: tuple[int, ...]
    biases: bool


def pack_experts(experts: Sequence[CodedExpert], hidden_size: int, element: Element) -> PackedExperts:
    """The tensors `table`, one of numbers or codes for each format, its scales and zeros, and `biases`.

    Experts follow one another in each tensor, first the matrices of all first products, then those of the second. So in
    a layer of equal experts each product has a tensor's part of its own with a fixed stride.
    """
    inputs = [_input_matrix(expert, hidden_size) for expert in experts]
    outputs = [expert.down.extended(hidden_size, expert.padded_width) for expert in experts]
    input_formats, output_formats = _formats(inputs), _formats(outputs)
    table = torch.zeros(len(experts), TABLE_COLUMNS, dtype=torch.int64)
    tensors: dict[str, torch.Tensor] = {"table": table}
    for side, matrices, formats, first in (
        ("input", inputs, input_formats, Column.INPUT_FORMAT),
        ("output", outputs, output_formats, Column.OUTPUT_FORMAT),
    ):
        parts: dict[str, list[torch.Tensor]] = {}
        for number, matrix in enumerate(matrices):
            name = f"{side}_{matrix.format.name}"
            table[number, first] = formats.index(matrix.format)
            table[number, first + 1] = _append(parts, name, storage(matrix, element))
            if matrix.scales is not None:
                table[number, first + 2] = _append(parts, f"{name}_scales", matrix.scales.T.reshape(-1))
            if matrix.zeros is not None:
                _append(parts, f"{name}_zeros", matrix.zeros.T.reshape(-1))
        tensors.update({name: torch.cat(items) for name, items in sorted(parts.items())})
    biases = any(expert.up_bias is not None or expert.down_bias is not None for expert in experts)
    parts = {}
    for number, expert in enumerate(experts):
        table[number, Column.WIDTH] = expert.padded_width
        if biases:
            table[number, Column.BIAS_OFFSET] = _append(parts, "biases", _biases(expert, hidden_size))
    tensors.update({name: torch.cat(items) for name, items in parts.items()})
    widths = tuple(expert.padded_width for expert in experts)
    return PackedExperts(tensors, input_formats, output_formats, widths, biases)


def storage(matrix: CodedMatrix, element: Element) -> torch.Tensor:
    """The numbers, bytes or words of a matrix whose columns are padded, as one vector."""
    item = matrix.format
    if not item.packed:
        return matrix.values.to(element.torch).reshape(-1)
    if item.bits == 8:
        return (matrix.values.to(torch.int16) - item.middle).to(torch.int8).reshape(-1)
    rows, columns = matrix.values.shape
    length = PLANE_BLOCK // item.planes
    codes = matrix.values.to(torch.int32).reshape(rows, columns // PLANE_BLOCK, item.planes, length)
    shifts = torch.arange(item.planes, dtype=torch.int32) * item.bits
    words = (codes << shifts[:, None]).sum(dim=2, dtype=torch.int32)
    # the upper half of the words are negative numbers of 16 bits
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16).reshape(-1)


def _input_matrix(expert: CodedExpert, hidden_size: int) -> CodedMatrix:
    columns = padded(hidden_size, expert.up.format.column_unit)
    up = expert.up.extended(expert.padded_width, columns)
    return up if expert.gate is None else expert.gate.extended(expert.padded_width, columns).below(up)


def _formats(matrices: Sequence[CodedMatrix]) -> tuple[MatrixFormat, ...]:
    found = {matrix.format for matrix in matrices} or {FLOAT}
    return tuple(sorted(found, key=lambda item: (item.bits, item.middle, item.scale_columns, item.zero_points)))


def _biases(expert: CodedExpert, hidden_size: int) -> torch.Tensor:
    width = expert.padded_width
    sizes = [(expert.up_bias, width), (expert.down_bias, hidden_size)]
    if expert.gate is not None:
        sizes.insert(0, (expert.gate_bias, width))
    parts = [torch.zeros(size) for _, size in sizes]
    for part, (bias, _) in zip(parts, sizes, strict=True):
        if bias is not None:
            part[: len(bias)] = bias
    return torch.cat(parts)


def _append(parts: dict[str, list[torch.Tensor]], name: str, values: torch.Tensor) -> int:
    """Puts values behind those of a name, padded for alignment; gives where they start."""
    items = parts.setdefault(name, [])
    start = sum(len(item) for item in items)
    items.append(torch.nn.functional.pad(values, (0, padded(len(values), WIDTH_UNIT) - len(values))))
    return start
