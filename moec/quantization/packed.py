"""A packed matrix: the operands of `quant.dequant` as tensors, and the numbers that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from moec.dialects.quant import (
    BlockFloat,
    Codebook,
    Format,
    Integer,
    Levels,
    Span,
    Ternary,
    TernaryDictionary,
    TritPacking,
    ZeroPoint,
)
from moec.errors import VerificationError
from moec.quantization.dictionary import decode_stream, stream_problem
from moec.quantization.packing import pack_bits, pack_trits, split_last, unpack_bits, unpack_trits
from moec.quantization.small_floats import element_values, scale_values


@dataclass(frozen=True)
class Packed:
    """A matrix [N, columns] in a format. The tensors are the operands of `quant.dequant`, of the types said there."""

    format: Format
    columns: int
    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None = None
    table: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    tensor_scale: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """N."""
        return len(self.codes) if self.offsets is None else len(self.offsets) - 1

    @property
    def shape(self) -> tuple[int, int]:
        """(N, columns)."""
        return (self.rows, self.columns)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The operands that there are, by name, in order."""
        return {name: tensor for name in OPERANDS if (tensor := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all operands; a table that several matrices share counts whole."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def of_rows(self, rows: Sequence[int]) -> Packed:
        """Only these rows, in this order, of integers whose scales are those of groups or rows."""
        assert isinstance(self.format, Integer) and self.format.span is not Span.TENSOR
        index = torch.tensor(rows, dtype=torch.int64)
        zeros = None if self.zero_points is None else self.zero_points[index]
        return replace(self, codes=self.codes[index], scales=self.scales[index], zero_points=zeros)

    def problem(self) -> str | None:
        """The first rule that the stored numbers break, in words; None where all hold."""
        kind = self.format
        scales = scale_values(kind.scale)[self.scales.long()] if isinstance(kind, BlockFloat) else self.scales
        floats = {"scale": scales, "tensor scale": self.tensor_scale, "table": self.table}
        if isinstance(kind, Integer) and kind.zero_point is ZeroPoint.FLOAT:
            floats["zero point"] = self.zero_points
        for what, tensor in floats.items():
            if tensor is not None and tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach()).all()):
                return f"a {what} is not finite"
        if isinstance(kind, Ternary | TernaryDictionary) and kind.levels is Levels.EXTREMES:
            if bool((scales[:, 0] > 0).any() | (scales[:, 1] < 0).any()):
                return "a lowest level is above zero, or a highest one below"
        elif bool((scales.detach() < 0).any() if isinstance(kind, BlockFloat) else (scales.detach() <= 0).any()):
            return "a scale is not positive"
        if isinstance(kind, Codebook) and kind.dim == 1:
            assert self.table is not None
            if bool((self.table[1:, 0] <= self.table[:-1, 0]).any()):
                return "the entries of a codebook do not ascend"
        if isinstance(kind, TernaryDictionary):
            assert self.offsets is not None and self.table is not None
            return stream_problem(self.codes, self.offsets, self.table, kind.code_bits, self.columns)
        if isinstance(kind, Ternary):
            limit = 255 if kind.packing is TritPacking.TWO_BITS else 3**5 - 1
            if bool((self.codes > limit).any()) or bool((self.integer_codes() > 2).any()):
                return "a code stands for no trit"
        return None

    def require(self, where: str) -> None:
        """Raises VerificationError, which names `where`, unless the stored numbers obey their format."""
        problem = self.problem()
        if problem is not None:
            raise VerificationError(f"packed weights are damaged: {problem}", where=where)

    def integer_codes(self) -> torch.Tensor:
        """The codes one by one, u8 [N, columns]; of a codebook [N, columns / dim]."""
        kind = self.format
        if isinstance(kind, TernaryDictionary):
            assert self.offsets is not None and self.table is not None
            return decode_stream(self.codes, self.offsets, self.table, kind.code_bits, self.columns)
        if isinstance(kind, Integer):
            return unpack_bits(self.codes, kind.bits, self.columns)
        if isinstance(kind, Codebook):
            return unpack_bits(self.codes, kind.bits, self.columns // kind.dim)
        if isinstance(kind, BlockFloat):
            return unpack_bits(self.codes, kind.element.bits, self.columns)
        assert isinstance(kind, Ternary)
        two_bits = kind.packing is TritPacking.TWO_BITS
        return unpack_bits(self.codes, 2, self.columns) if two_bits else unpack_trits(self.codes, self.columns)

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [N, columns] in float32 or float64; gradients reach scales, levels and numbers in tables."""
        kind, codes = self.format, self.integer_codes()
        if isinstance(kind, Integer):
            numbers = codes.to(dtype)
            return self._scaled(numbers - self._zeros(kind, dtype), dtype)
        if isinstance(kind, Codebook):
            assert self.table is not None
            entries = self.table.to(dtype)[codes.long()].flatten(-2)
            return self._scaled(entries, dtype)
        if isinstance(kind, BlockFloat):
            scales = scale_values(kind.scale)[self.scales.long()].to(dtype)
            if self.tensor_scale is not None:
                scales = scales * self.tensor_scale.to(dtype)
            elements = element_values(kind.element).to(dtype)[codes.long()]
            return (split_last(elements, kind.block) * scales[:, :, None]).flatten(1)
        assert isinstance(kind, Ternary | TernaryDictionary)
        if kind.levels is Levels.EXTREMES:
            low, high = self.scales.to(dtype).unbind(1)
            zero = torch.zeros((), dtype=dtype)
            return torch.where(codes == 1, low[:, None], torch.where(codes == 2, high[:, None], zero))
        return self._scaled((codes == 2).to(dtype) - (codes == 1).to(dtype), dtype)

    def _zeros(self, kind: Integer, dtype: torch.dtype) -> torch.Tensor:
        """Zero points of all weights, [N, K], [N, 1], [1, 1] or no dimension."""
        if self.zero_points is None:
            return torch.tensor(kind.middle, dtype=dtype)
        zeros = self.zero_points
        if kind.zero_point is ZeroPoint.INTEGER:
            zeros = unpack_bits(zeros, kind.bits, self.scales.shape[1])
        return _spread(zeros.to(dtype), self.columns)

    def _scaled(self, numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return numbers * _spread(self.scales.to(dtype), self.columns)


OPERANDS = tuple(field.name for field in fields(Packed) if field.name not in ("format", "columns"))
"""The operands of `quant.dequant`, in order."""


def _spread(values: torch.Tensor, columns: int) -> torch.Tensor:
    """[R, G] to [R, columns], or [R, 1] where there is one group."""
    groups = values.shape[1]
    return values if groups == 1 else values.repeat_interleave(columns // groups, dim=1)


def pack_codes(kind: Format, codes: torch.Tensor) -> torch.Tensor:
    """The operand `codes` of integer codes [N, K], for every format but streams."""
    if isinstance(kind, Integer | Codebook):
        return pack_bits(codes, kind.bits)
    if isinstance(kind, BlockFloat):
        return pack_bits(codes, kind.element.bits)
    assert isinstance(kind, Ternary)
    return pack_bits(codes, 2) if kind.packing is TritPacking.TWO_BITS else pack_trits(codes)


def groups_of(kind: Format, columns: int) -> int:
    """The number of columns that are quantised with one scale; `columns` where it is the row or the whole matrix."""
    if isinstance(kind, BlockFloat):
        return kind.block
    if isinstance(kind, Integer | Ternary | Codebook) and kind.span is Span.GROUP:
        return kind.group
    return columns
