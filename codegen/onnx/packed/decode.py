"""The numbers of packed weights by operators of ai.onnx: shifts, masks, tables, products with scales."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from moec.codegen.onnx.graph import GraphBuilder
from moec.codegen.onnx.packed.decode_stream import decode_stream
from moec.codegen.onnx.packed.matrix import PackedMatrix
from moec.dialects.quant import (
    BlockFloat,
    Codebook,
    Integer,
    Levels,
    Ternary,
    TernaryDictionary,
    TritPacking,
    ZeroPoint,
)
from moec.ir.types import DType
from moec.quantization.small_floats import element_values, scale_values

_TRITS = 5


def decode(b: GraphBuilder, packed: PackedMatrix[ir.Value]) -> ir.Value:
    """float32 [N, columns]. The rows may be some of the matrix's, the same ones of codes, scales and zero points."""
    kind, columns = packed.format, packed.columns
    if isinstance(kind, BlockFloat):
        return _block_float(b, packed, kind)
    if isinstance(kind, TernaryDictionary):
        trits = decode_stream(b, packed["codes"], packed["offsets"], packed["table"], kind.code_bits, columns)
        return _ternary(b, trits, packed, kind.levels)
    if isinstance(kind, Ternary):
        if kind.packing is TritPacking.TWO_BITS:
            trits = unpack_bits(b, packed["codes"], 2, columns)
        else:
            trits = unpack_trits(b, packed["codes"], columns)
        return _ternary(b, trits, packed, kind.levels)
    if isinstance(kind, Codebook):
        codes = unpack_bits(b, packed["codes"], kind.bits, columns // kind.dim)
        entries = b.op("Gather", packed["table"], _index(b, codes), axis=0)
        return _scaled(b, b.reshape(entries, (-1, columns)), packed, None)
    assert isinstance(kind, Integer)
    return _integer(b, packed, kind)


def unpack_bits(b: GraphBuilder, codes: ir.Value, bits: int, columns: int) -> ir.Value:
    """Codes u8 [N, columns], one in a byte, of rows u8 [N, bytes] in which they lie lowest bit first; 1 to 8 bits."""
    if bits == 8:
        return codes
    nbytes = -(-columns * bits // 8)
    mask = b.constant(np.array((1 << bits) - 1, np.uint8))
    if 8 % bits == 0:
        each = 8 // bits
        split = b.reshape(codes, (-1, 1, nbytes))
        shifted = b.op("BitShift", split, _bytes_along_axis_1(b, range(0, 8, bits)), direction="RIGHT")
        return _in_order(b, b.op("BitwiseAnd", shifted, mask), nbytes * each, columns)
    # eight codes fill `bits` bytes; a code lies in one of them or in two that follow each other
    runs = -(-nbytes // bits)
    if nbytes % bits:
        codes = b.op("Pad", codes, b.ints(0, 0, 0, runs * bits - nbytes), b.constant(np.array(0, np.uint8)))
    planes = b.op("Transpose", b.reshape(codes, (-1, runs, bits)), perm=[0, 2, 1])
    starts = [place * bits for place in range(8)]
    straddles = [start % 8 + bits > 8 for start in starts]
    low = b.op("Gather", planes, b.ints(*[start // 8 for start in starts]), axis=1)
    low = b.op("BitShift", low, _bytes_along_axis_1(b, [start % 8 for start in starts]), direction="RIGHT")
    following = [start // 8 + straddle for start, straddle in zip(starts, straddles, strict=True)]
    # where a code has no second byte, what is shifted in stays above the mask
    shifts = [8 - start % 8 if straddle else 7 for start, straddle in zip(starts, straddles, strict=True)]
    high = b.op("Gather", planes, b.ints(*following), axis=1)
    high = b.op("BitShift", high, _bytes_along_axis_1(b, shifts), direction="LEFT")
    return _in_order(b, b.op("BitwiseAnd", b.op("BitwiseOr", low, high), mask), runs * 8, columns)


def unpack_trits(b: GraphBuilder, codes: ir.Value, columns: int) -> ir.Value:
    """Trits u8 [N, columns] of rows u8 [N, bytes] of five trits each."""
    digits = np.arange(256)[:, None] // 3 ** np.arange(_TRITS) % 3
    trits = b.op("Gather", b.constant(digits.astype(np.uint8)), _index(b, codes), axis=0)
    nbytes = -(-columns // _TRITS)
    return _first_columns(b, b.reshape(trits, (-1, nbytes * _TRITS)), nbytes * _TRITS, columns)


def as_float(b: GraphBuilder, packed: PackedMatrix[ir.Value], name: str) -> ir.Value:
    """Scales, levels or zero points that are numbers, as float32."""
    return packed[name] if packed.number_type is DType.F32 else b.cast(packed[name], DType.F32)


def block_scales(b: GraphBuilder, packed: PackedMatrix[ir.Value], kind: BlockFloat) -> ir.Value:
    """float32 [N, G], the tensor scale included."""
    table = b.constant(scale_values(kind.scale).numpy())
    scales = b.op("Gather", table, _index(b, packed["scales"]), axis=0)
    whole = packed.get("tensor_scale")
    return scales if whole is None else b.op("Mul", scales, whole)


def _block_float(b: GraphBuilder, packed: PackedMatrix[ir.Value], kind: BlockFloat) -> ir.Value:
    codes = unpack_bits(b, packed["codes"], kind.element.bits, packed.columns)
    elements = b.op("Gather", b.constant(element_values(kind.element).numpy()), _index(b, codes), axis=0)
    blocks = b.reshape(elements, (-1, packed.columns // kind.block, kind.block))
    scales = b.op("Unsqueeze", block_scales(b, packed, kind), b.ints(2))
    return b.reshape(b.op("Mul", blocks, scales), (-1, packed.columns))


def _ternary(b: GraphBuilder, trits: ir.Value, packed: PackedMatrix[ir.Value], levels: Levels) -> ir.Value:
    if levels is Levels.SCALE:
        signs = b.op("Gather", b.constant(np.array([0.0, -1.0, 1.0], np.float32)), _index(b, trits), axis=0)
        return _scaled(b, signs, packed, None)
    low, high = b.ops("Split", as_float(b, packed, "scales"), b.ints(1, 1), outputs=2, axis=1)
    upper = b.op("Where", b.op("Equal", trits, b.constant(np.array(2, np.uint8))), high, b.number(0.0))
    return b.op("Where", b.op("Equal", trits, b.constant(np.array(1, np.uint8))), low, upper)


def _integer(b: GraphBuilder, packed: PackedMatrix[ir.Value], kind: Integer) -> ir.Value:
    columns = packed.columns
    codes = unpack_bits(b, packed["codes"], kind.bits, columns)
    shape = kind.scale_shape(packed.rows, columns)
    if kind.zero_point is ZeroPoint.FLOAT or kind.bits == 1:
        zero = b.constant(np.array([[kind.middle]], np.float32))
        if kind.zero_point is ZeroPoint.FLOAT:
            zero = as_float(b, packed, "zero_points")
        elif kind.zero_point is ZeroPoint.INTEGER:
            zero = b.cast(unpack_bits(b, packed["zero_points"], kind.bits, shape[1]), DType.F32)
        return _scaled(b, b.cast(codes, DType.F32), packed, zero)
    scales = as_float(b, packed, "scales")
    if kind.zero_point is ZeroPoint.INTEGER:
        zero = unpack_bits(b, packed["zero_points"], kind.bits, shape[1])
    else:
        zero = b.op("Expand", b.constant(np.array(int(kind.middle), np.uint8)), b.op("Shape", scales))
    if shape[1] > 1:
        return b.op("DequantizeLinear", codes, scales, zero, axis=1, block_size=columns // shape[1])
    per_row = () if shape[0] == 1 else (-1,)
    return b.op("DequantizeLinear", codes, b.reshape(scales, per_row), b.reshape(zero, per_row), axis=0)


def _scaled(b: GraphBuilder, numbers: ir.Value, packed: PackedMatrix[ir.Value], zero: ir.Value | None) -> ir.Value:
    """(numbers [N, columns] - zero) * scales; zero [R, G] or [1, 1]."""
    columns = packed.columns
    groups = packed.format.scale_shape(packed.rows, columns)[1]
    scales = as_float(b, packed, "scales")
    if groups > 1:
        numbers = b.reshape(numbers, (-1, groups, columns // groups))
        scales = b.op("Unsqueeze", scales, b.ints(2))
        zero = b.op("Unsqueeze", zero, b.ints(2)) if zero is not None else None
    shifted = numbers if zero is None else b.op("Sub", numbers, zero)
    product = b.op("Mul", shifted, scales)
    return product if groups == 1 else b.reshape(product, (-1, columns))


def _index(b: GraphBuilder, codes: ir.Value) -> ir.Value:
    return b.cast(codes, DType.I32)


def _bytes_along_axis_1(b: GraphBuilder, numbers: range | list[int]) -> ir.Value:
    return b.constant(np.array(numbers, np.uint8).reshape(1, -1, 1))


def _in_order(b: GraphBuilder, planes: ir.Value, found: int, columns: int) -> ir.Value:
    """Codes [N, phases, bytes] in the order of columns, without what the last byte has too many."""
    rows = b.reshape(b.op("Transpose", planes, perm=[0, 2, 1]), (-1, found))
    return _first_columns(b, rows, found, columns)


def _first_columns(b: GraphBuilder, rows: ir.Value, found: int, columns: int) -> ir.Value:
    return rows if found == columns else b.op("Slice", rows, b.ints(0), b.ints(columns), b.ints(1))
