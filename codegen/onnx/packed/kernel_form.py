"""Which packed matrices `com.microsoft::MatMulNBits` can multiply, and as what.

Its codes are unsigned integers of 2, 4 or 8 bits in blocks of 16 to 256 columns, each block with a scale. So every
format whose weights are whole multiples of a scale goes there, in codes of the next width that has a fast kernel;
codes that are stored in another width or order are rearranged by operators that the runtime folds when it loads the
file, so that the file holds the bytes of the format.

What is fast was measured on ONNX Runtime 1.31 (`tests/benchmarks/packed_products.py`): with float activations only 4
bits, whence 8 bits go there as two products of 4; with int8 activations 4 and 8 bits, and 2 bits in blocks of 32 to
128.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.artifact.options import Activations
from moec.dialects.quant import BlockFloat, Element, Format, Integer, Levels, Span, Ternary, ZeroPoint
from moec.quantization.packed import groups_of
from moec.quantization.small_floats import element_values

_BLOCKS = (256, 128, 64, 32, 16)
# blocks where one scale serves a row or more
_ROW_BLOCKS = (128, 64, 32, 16)
_TWO_BIT_BLOCKS = (128, 64, 32)
_PADDED_BLOCK = 32


def accuracy_level(activations: Activations) -> int:
    """The attribute of MatMulNBits and QMoE by which they round activations, or not."""
    return 4 if activations is Activations.INT8 else 0


@dataclass(frozen=True)
class KernelForm:
    """A matrix as MatMulNBits takes it.

    weight = scale * multiplier * (code - zero), in codes of `bits` (8 in two planes of 4 if `in_planes`), one scale for
    `block` columns; a stored scale serves `repeats` blocks. `numbers` maps stored codes to code - zero, where they are
    no zero points; `own_zeros` says that zero points are codes of their own, `correction` that they are numbers, whose
    part of the product is computed apart.
    """

    bits: int
    in_planes: bool
    block: int
    repeats: int
    numbers: tuple[int, ...]
    multiplier: float
    own_zeros: bool
    correction: bool

    @property
    def zero(self) -> int:
        """The code of zero where there are no zero points."""
        return 1 << (self.bits - 1)


def kernel_form(packed: Format, columns: int, activations: Activations) -> KernelForm | None:
    """How MatMulNBits takes rows of `columns` weights; None where it cannot."""
    found = _numbers(packed)
    if found is None:
        return None
    numbers, multiplier = found
    own_zeros = isinstance(packed, Integer) and packed.zero_point is ZeroPoint.INTEGER
    correction = isinstance(packed, Integer) and packed.zero_point is ZeroPoint.FLOAT
    group = groups_of(packed, columns)
    spans_row = getattr(packed, "span", Span.GROUP) is not Span.GROUP
    block = next((size for size in (_ROW_BLOCKS if spans_row else _BLOCKS) if group % size == 0), None)
    if block is None:
        if not spans_row:
            return None
        block = _PADDED_BLOCK
    needed = max((number if number >= 0 else -number - 1).bit_length() + 1 for number in numbers)
    bits = next(width for width in (2, 4, 8) if needed <= width)
    if bits == 2 and (activations is Activations.FLOAT32 or block not in _TWO_BIT_BLOCKS):
        bits = 4
    in_planes = bits == 8 and activations is Activations.FLOAT32
    return KernelForm(bits, in_planes, block, -(-group // block), numbers, multiplier, own_zeros, correction)


def _numbers(packed: Format) -> tuple[tuple[int, ...], float] | None:
    """(what each code stands for, in whole multiples; the multiple): before zero points, if there are any."""
    match packed:
        case Integer(bits=1, zero_point=ZeroPoint.MIDDLE):
            return (-1, 1), 0.5
        case Integer(bits=bits):
            return tuple(range(-(1 << bits - 1), 1 << bits - 1)), 1.0
        case Ternary(levels=Levels.SCALE):
            # the fourth code stands for nothing
            return (0, -1, 1, 0), 1.0
        case BlockFloat(element=Element.E2M1):
            return tuple(int(2 * value) for value in element_values(Element.E2M1).tolist()), 0.5
    return None
