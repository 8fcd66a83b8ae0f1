"""Packed weights: how their numbers are stored, and the operation that gives them back as float32.

A format says what the codes of a matrix [N, K] mean and how they lie in bytes. Rows never share a byte; within a row
the bits of a code start at the least significant free bit of a byte. What a format needs besides its codes (scales,
zero points, a table) are operands of their own. Sizes below: R is N, or 1 where one scale serves the whole matrix; G
is the number of groups of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from moec.dialects.nn import tensor_type
from moec.ir.attributes import enum_attribute, struct_attribute
from moec.ir.definition import Attr, Op, Operand, OptionalOperand, Result
from moec.ir.types import DType, TensorType, Type
from moec.ir.verifier import VerifyError

MAX_PAIRS = 14
"""Pairs of trits that one code of a dictionary stands for at most; they fill the 8 bytes of a table's row."""


@enum_attribute("quant.span")
class Span(Enum):
    """The weights that share a scale: the whole matrix, a row, or `group` columns of a row."""

    TENSOR = "tensor"
    ROW = "row"
    GROUP = "group"


@enum_attribute("quant.zero_point")
class ZeroPoint(Enum):
    """The code that stands for zero: the middle of the range, or one of its own per scale, a code or a number."""

    MIDDLE = "middle"
    INTEGER = "integer"
    FLOAT = "float"


@enum_attribute("quant.levels")
class Levels(Enum):
    """The values of a trit: -s, 0 and s, or a lowest value, 0 and a highest value."""

    SCALE = "scale"
    EXTREMES = "extremes"


@enum_attribute("quant.trits")
class TritPacking(Enum):
    """How trits lie in bytes: two bits each, or five in a byte as its digits to the base 3, lowest first."""

    TWO_BITS = "two_bits"
    FIVE_PER_BYTE = "five_per_byte"


@enum_attribute("quant.element")
class Element(Enum):
    """Small floating-point numbers of the OCP Microscaling specification; E4M3 without infinities."""

    E2M1 = "e2m1"
    E4M3 = "e4m3"

    @property
    def bits(self) -> int:
        """Size of a code."""
        return 4 if self is Element.E2M1 else 8


@enum_attribute("quant.block_scale")
class BlockScale(Enum):
    """The scale of a block, one byte: a power of two, 2^(byte - 127), or a positive E4M3 number."""

    E8M0 = "e8m0"
    E4M3 = "e4m3"


SCALE_TYPES = (DType.F32, DType.F16, DType.BF16)
"""Element types that scales, levels and zero points that are numbers may have."""


@dataclass(frozen=True, slots=True)
class Format:
    """What the codes of a packed matrix mean. The concrete formats are its subclasses."""

    def row_bytes(self, columns: int) -> int:
        """Bytes of the codes of one row; 0 where the codes of all rows are one stream."""
        raise NotImplementedError

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """The shape of the operand `scales`."""
        raise NotImplementedError

    def problem(self, columns: int) -> str | None:
        """The first rule that the format breaks for rows of `columns` weights, in words; None where all hold."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class _Spanned(Format):
    """A format with one scale per span."""

    def spans(self, span: Span, group: int, rows: int, columns: int) -> tuple[int, int]:
        """(R, G)."""
        return (1 if span is Span.TENSOR else rows, columns // group if span is Span.GROUP and group else 1)

    def span_problem(self, span: Span, group: int, columns: int) -> str | None:
        """The rule that a span breaks."""
        if span is not Span.GROUP:
            return f"a group of {group} needs span = group" if group else None
        if group < 1 or columns % group:
            return f"groups of {group} do not divide rows of {columns} weights"
        return None


@struct_attribute("quant.integer")
@dataclass(frozen=True, slots=True)
class Integer(_Spanned):
    """Unsigned codes q of 1 to 8 bits: weight = scale * (q - zero point).

    `middle` is 2^(bits - 1), so that the numbers are those of two's complement; with 1 bit it is 0.5, so that the
    weights are both signs of half the scale. `scales` [R, G] float. `zero_points`: none for `middle`; for `integer`
    u8 [R, bytes], packed as the codes of a row of G; for `float` [R, G] of the type of the scales.
    """

    bits: int
    span: Span = Span.ROW
    group: int = 0
    zero_point: ZeroPoint = ZeroPoint.MIDDLE

    @property
    def middle(self) -> float:
        """The code of zero where there are no zero points."""
        return 0.5 if self.bits == 1 else float(1 << (self.bits - 1))

    def row_bytes(self, columns: int) -> int:
        return -(-columns * self.bits // 8)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return self.spans(self.span, self.group, rows, columns)

    def zero_point_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """The shape of the operand `zero_points`, where there is one."""
        scales, groups = self.spans(self.span, self.group, rows, columns)
        return (scales, groups) if self.zero_point is ZeroPoint.FLOAT else (scales, self.row_bytes(groups))

    def problem(self, columns: int) -> str | None:
        if not 1 <= self.bits <= 8:
            return f"integers have 1 to 8 bits, not {self.bits}"
        return self.span_problem(self.span, self.group, columns)


@struct_attribute("quant.ternary")
@dataclass(frozen=True, slots=True)
class Ternary(_Spanned):
    """Trits: code 0 is 0, 1 is the lower level, 2 the upper one.

    `scales` [R, G] hold s > 0 of the levels -s and s; with `extremes` they are [R, 2], lowest <= 0 <= highest, and
    groups are not allowed (QMoE, arXiv 2310.16795).
    """

    levels: Levels = Levels.SCALE
    span: Span = Span.ROW
    group: int = 0
    packing: TritPacking = TritPacking.TWO_BITS

    def row_bytes(self, columns: int) -> int:
        return -(-columns // (4 if self.packing is TritPacking.TWO_BITS else 5))

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        scales, groups = self.spans(self.span, self.group, rows, columns)
        return (scales, 2 if self.levels is Levels.EXTREMES else groups)

    def problem(self, columns: int) -> str | None:
        if self.levels is Levels.EXTREMES and self.span is Span.GROUP:
            return "extremes are those of a row or of a matrix, not of a group"
        return self.span_problem(self.span, self.group, columns)


@struct_attribute("quant.codebook")
@dataclass(frozen=True, slots=True)
class Codebook(_Spanned):
    """Codes of `bits` are entries of a table, each of which is `dim` neighbouring weights: weight = scale * entry.

    `table` f32 [2^bits, dim]; with dim 1 its entries ascend. `scales` [R, G] float.
    """

    bits: int
    dim: int = 1
    span: Span = Span.ROW
    group: int = 0

    def row_bytes(self, columns: int) -> int:
        return -(-(columns // self.dim) * self.bits // 8)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return self.spans(self.span, self.group, rows, columns)

    def problem(self, columns: int) -> str | None:
        if not 1 <= self.bits <= 8:
            return f"entries of a codebook have codes of 1 to 8 bits, not {self.bits}"
        if self.dim not in (1, 2, 4, 8):
            return f"an entry holds 1, 2, 4 or 8 weights, not {self.dim}"
        if columns % self.dim or self.group % self.dim:
            return f"entries of {self.dim} weights do not divide rows of {columns} in groups of {self.group}"
        return self.span_problem(self.span, self.group, columns)


@struct_attribute("quant.block_float")
@dataclass(frozen=True, slots=True)
class BlockFloat(Format):
    """Small floats with one byte of scale per block: weight = tensor scale * block scale * element.

    MXFP4 is E2M1 in blocks of 32 with E8M0 scales, NVFP4 is E2M1 in blocks of 16 with E4M3 scales and a tensor scale.
    `scales` u8 [N, K / block]; `tensor_scale` f32 [1], only with E4M3 scales.
    """

    element: Element = Element.E2M1
    block: int = 32
    scale: BlockScale = BlockScale.E8M0

    def row_bytes(self, columns: int) -> int:
        return -(-columns * self.element.bits // 8)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return (rows, columns // self.block)

    def problem(self, columns: int) -> str | None:
        if self.block not in (16, 32):
            return f"blocks hold 16 or 32 weights, not {self.block}"
        if columns % self.block:
            return f"blocks of {self.block} do not divide rows of {columns} weights"
        return None


@struct_attribute("quant.dictionary")
@dataclass(frozen=True, slots=True)
class TernaryDictionary(_Spanned):
    """Trits in a stream of codes, each of which stands for 1 to 14 pairs of them (QMoE, arXiv 2310.16795, section 4).

    `codes` u8 [bytes], `code_bits` each, lowest bit first; the codes of row i are those from `offsets[i]` to
    `offsets[i + 1]`, and bytes behind the last are padding. `offsets` i32 [N + 1]. `table` u8 [2^code_bits, 8]: in
    each half of 4 bytes, read as a little-endian number, the lowest 4 bits are the number of pairs, and 4 bits follow
    for each of 7 pairs, the first trit of a pair in the lower 2. `scales` as in `Ternary`; spans are a row or the
    whole matrix.
    """

    code_bits: int = 16
    levels: Levels = Levels.EXTREMES
    span: Span = Span.ROW

    def row_bytes(self, columns: int) -> int:
        return 0

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return (1 if self.span is Span.TENSOR else rows, 2 if self.levels is Levels.EXTREMES else 1)

    def problem(self, columns: int) -> str | None:
        if not 4 <= self.code_bits <= 16:
            return f"codes have 4 to 16 bits, not {self.code_bits}"
        if self.span is Span.GROUP:
            return "trits of a dictionary have levels per row or per matrix, not per group"
        return None


class DequantOp(Op, name="quant.dequant", pure=True):
    """The weights f32 [N, columns] of a packed matrix.

    `codes` u8 [N, bytes], for `TernaryDictionary` [bytes]. Which of the others there are, and their shapes, the format
    says. It stands in the body of experts, on one slice of stacks of packed codes, or between a weight and what reads
    it.
    """

    codes = Operand()
    scales = Operand()
    zero_points = OptionalOperand()
    table = OptionalOperand()
    offsets = OptionalOperand()
    tensor_scale = OptionalOperand()
    weight = Result()
    format = Attr(Format)
    columns = Attr(int)

    def infer(self) -> Sequence[Type]:
        packed: Format = self.format
        columns: int = self.columns
        problem = packed.problem(columns) if columns > 0 else f"{columns} columns"
        if problem is not None:
            raise VerifyError(f"{self.name}: {problem}", self)
        rows = self._rows(packed, columns)
        scales = tensor_type(self, self.scales, "scales")
        allowed = (DType.U8,) if isinstance(packed, BlockFloat) else SCALE_TYPES
        if scales.shape != packed.scale_shape(rows, columns) or scales.dtype not in allowed:
            wanted = "x".join(map(str, packed.scale_shape(rows, columns)))
            raise VerifyError(f"{self.name}: scales {scales} are not {wanted} of {_names(allowed)}", self)
        self._check_zero_points(packed, rows, columns, scales.dtype)
        table: TensorType | None = None
        if isinstance(packed, Codebook):
            table = TensorType((1 << packed.bits, packed.dim), DType.F32)
        elif isinstance(packed, TernaryDictionary):
            table = TensorType((1 << packed.code_bits, 8), DType.U8)
        self._check("table", table)
        tensor_scale = isinstance(packed, BlockFloat) and packed.scale is BlockScale.E4M3
        self._check("tensor_scale", TensorType((1,), DType.F32) if tensor_scale else None)
        return [TensorType((rows, columns), DType.F32)]

    def _rows(self, packed: Format, columns: int) -> int:
        codes = tensor_type(self, self.codes, "codes")
        if codes.dtype is not DType.U8 or not codes.is_static:
            raise VerifyError(f"{self.name}: codes are bytes, ui8, not {codes}", self)
        if isinstance(packed, TernaryDictionary):
            offsets = None if self.offsets is None else tensor_type(self, self.offsets, "offsets", 1)
            if offsets is None or offsets.dtype is not DType.I32 or offsets.static_shape[0] < 2 or codes.rank != 1:
                raise VerifyError(f"{self.name}: a stream of codes needs offsets i32 of its rows", self)
            return offsets.static_shape[0] - 1
        self._check("offsets", None)
        if codes.rank != 2 or codes.shape[1] != packed.row_bytes(columns):
            raise VerifyError(
                f"{self.name}: a row of {columns} weights takes {packed.row_bytes(columns)} bytes, codes are {codes}",
                self,
            )
        return codes.static_shape[0]

    def _check_zero_points(self, packed: Format, rows: int, columns: int, scales: DType) -> None:
        wanted: TensorType | None = None
        if isinstance(packed, Integer) and packed.zero_point is not ZeroPoint.MIDDLE:
            dtype = DType.U8 if packed.zero_point is ZeroPoint.INTEGER else scales
            wanted = TensorType(packed.zero_point_shape(rows, columns), dtype)
        self._check("zero_points", wanted)

    def _check(self, what: str, wanted: TensorType | None) -> None:
        value = getattr(self, what)
        found = None if value is None else value.type
        if found != wanted:
            has = "has no" if found is None else f"has {found} as"
            raise VerifyError(f"{self.name}: it {has} {what}, the format needs {wanted or 'none'}", self)


def bits_per_weight(packed: Format, rows: int, columns: int, scale_bytes: int = 4) -> float:
    """Stored bits per weight of a matrix [rows, columns], without tables and streams of codes.

    `scale_bytes` is the size of one scale, level or zero point that is a number.
    """
    scales = math.prod(packed.scale_shape(rows, columns))
    size = rows * packed.row_bytes(columns) + scales * (1 if isinstance(packed, BlockFloat) else scale_bytes)
    if isinstance(packed, Integer) and packed.zero_point is not ZeroPoint.MIDDLE:
        each = 1 if packed.zero_point is ZeroPoint.INTEGER else scale_bytes
        size += math.prod(packed.zero_point_shape(rows, columns)) * each
    return 8 * size / (rows * columns)


def _names(dtypes: Sequence[DType]) -> str:
    return ", ".join(dtype.value for dtype in dtypes)
