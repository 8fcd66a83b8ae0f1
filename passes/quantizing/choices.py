"""The options of `quantize` that say which format weights get."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from moec.dialects.quant import (
    BlockFloat,
    BlockScale,
    Codebook,
    Element,
    Format,
    Integer,
    Levels,
    Span,
    Ternary,
    TritPacking,
    ZeroPoint,
)
from moec.quantization.codebooks import normal_float_table
from moec.quantization.grids import GridSettings, TernaryFit
from moec.quantization.rounding import Target


class Kind(Enum):
    """A family of formats."""

    INTEGER = "integer"
    TERNARY = "ternary"
    NF4 = "nf4"
    KMEANS = "kmeans"
    MXFP4 = "mxfp4"
    NVFP4 = "nvfp4"


class Coding(Enum):
    """How codes are chosen: each the nearest one, or to make up for each other's errors (GPTQ)."""

    RTN = "rtn"
    GPTQ = "gptq"


class Trits(Enum):
    """How trits lie in bytes."""

    TWO_BITS = "2bit"
    FIVE_PER_BYTE = "5per8"


class ScaleType(Enum):
    """The type that scales are stored in."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"

    @property
    def dtype(self) -> torch.dtype:
        """As torch names it."""
        return {ScaleType.F32: torch.float32, ScaleType.F16: torch.float16, ScaleType.BF16: torch.bfloat16}[self]


class ZeroPoints(Enum):
    """What an asymmetric grid stores besides scales."""

    INTEGER = "integer"
    FLOAT = "float"


@dataclass(frozen=True)
class FormatOptions:
    """Everything about a format that people choose. `group` is a number of columns, `row` or `tensor`."""

    kind: Kind = Kind.INTEGER
    bits: int = 4
    group: str = "32"
    symmetric: bool = False
    zero_points: ZeroPoints = ZeroPoints.INTEGER
    ternary: TernaryFit = TernaryFit.ROW_MINMAX
    trits: Trits = Trits.TWO_BITS
    scales: ScaleType = ScaleType.F32
    search: bool = False

    def target(self) -> Target:
        """Format and settings; raises ValueError for what cannot be."""
        span, group = self._span()
        settings = GridSettings(
            self.scales.dtype,
            self.search,
            self.ternary,
            normal_float_table() if self.kind is Kind.NF4 else None,
        )
        return Target(self._format(span, group), settings)

    def _format(self, span: Span, group: int) -> Format:
        match self.kind:
            case Kind.INTEGER:
                if not 1 <= self.bits <= 8:
                    raise ValueError(f"integers have 1 to 8 bits, not {self.bits}")
                zero = ZeroPoint.INTEGER if self.zero_points is ZeroPoints.INTEGER else ZeroPoint.FLOAT
                # of two codes, one that stands for zero would leave weights of one sign none
                is_sign = self.bits == 1 and zero is ZeroPoint.INTEGER
                return Integer(self.bits, span, group, ZeroPoint.MIDDLE if self.symmetric or is_sign else zero)
            case Kind.TERNARY:
                packing = TritPacking.TWO_BITS if self.trits is Trits.TWO_BITS else TritPacking.FIVE_PER_BYTE
                if self.ternary is TernaryFit.ROW_MINMAX:
                    return Ternary(Levels.EXTREMES, Span.TENSOR if span is Span.TENSOR else Span.ROW, packing=packing)
                return Ternary(Levels.SCALE, span, group, packing)
            case Kind.NF4:
                return Codebook(4, 1, span, group)
            case Kind.KMEANS:
                if not 1 <= self.bits <= 8:
                    raise ValueError(f"a codebook has 1 to 8 bits, not {self.bits}")
                return Codebook(self.bits, 1, span, group)
            case Kind.MXFP4:
                return BlockFloat(Element.E2M1, 32, BlockScale.E8M0)
            case Kind.NVFP4:
                return BlockFloat(Element.E2M1, 16, BlockScale.E4M3)

    def _span(self) -> tuple[Span, int]:
        if self.group in (Span.ROW.value, Span.TENSOR.value):
            return Span(self.group), 0
        if not self.group.isdigit() or int(self.group) < 1:
            raise ValueError(f"group {self.group!r} is no number of columns, nor row or tensor")
        return Span.GROUP, int(self.group)
