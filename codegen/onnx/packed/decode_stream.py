"""Trits of a stream of dictionary codes by operators of ai.onnx (QMoE, arXiv 2310.16795, section 4).

Everything is computed from the codes, the table's entries of these codes too: what depends on nothing but weights, a
runtime would compute when it loads the model, and keep unpacked.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from moec.codegen.onnx.graph import GraphBuilder
from moec.ir.types import DType

_TRITS = 28


def decode_stream(
    b: GraphBuilder, codes: ir.Value, offsets: ir.Value, table: ir.Value, code_bits: int, columns: int
) -> ir.Value:
    """Trits u8 [N, columns] of `codes` u8 [bytes], `offsets` i32 [N + 1] and `table` u8 [2^code_bits, 8]."""
    count = b.cast(b.op("Gather", offsets, b.integer(-1), axis=0), DType.I64)
    entries = b.op("Gather", table, _numbers(b, codes, count, code_bits), axis=0)
    # 16 nibbles: a number of pairs, 7 pairs, the number again, 7 pairs
    halves = b.op("BitShift", b.op("Unsqueeze", entries, b.ints(2)), _u8([0, 4], b), direction="RIGHT")
    nibbles = b.reshape(b.op("BitwiseAnd", halves, _u8(15, b)), (-1, 16))
    places = [place for place in range(16) if place % 8]
    pairs = b.op("Unsqueeze", b.op("Gather", nibbles, b.ints(*places), axis=1), b.ints(2))
    trits = b.op("BitwiseAnd", b.op("BitShift", pairs, _u8([0, 2], b), direction="RIGHT"), _u8(3, b))
    length = b.op("Mul", b.op("Gather", nibbles, b.ints(0), axis=1), _u8(2, b))
    used = b.op("Less", b.constant(np.arange(_TRITS, dtype=np.int32)), b.cast(length, DType.I32))
    row = columns + columns % 2
    decoded = b.reshape(b.op("Compress", b.reshape(trits, (-1,)), b.reshape(used, (-1,))), (-1, row))
    return decoded if row == columns else b.op("Slice", decoded, b.ints(0), b.ints(columns), b.ints(1))


def _numbers(b: GraphBuilder, codes: ir.Value, count: ir.Value, code_bits: int) -> ir.Value:
    """The first `count` codes, int32 [count]. A code starts anywhere in a byte, in steps of the bits' divisor of 8."""
    starts = b.op("Mul", b.op("Range", b.integer(0), count, b.integer(1)), b.integer(code_bits))
    first = b.op("Div", starts, b.integer(8))
    padded = b.op("Concat", codes, _u8([0, 0], b), axis=0)
    total: ir.Value | None = None
    for place in range(-(-(8 - math.gcd(8, code_bits) + code_bits) // 8)):
        byte = b.cast(b.op("Gather", padded, b.op("Add", first, b.integer(place)), axis=0), DType.I32)
        part = b.op("Mul", byte, b.constant(np.array(256**place, np.int32)))
        total = part if total is None else b.op("Add", total, part)
    assert total is not None
    if code_bits % 8 == 0:
        return total
    powers = b.op("Gather", b.constant(2 ** np.arange(8, dtype=np.int32)), b.op("Mod", starts, b.integer(8)), axis=0)
    return b.op("Mod", b.op("Div", total, powers), b.constant(np.array(1 << code_bits, np.int32)))


def _u8(numbers: int | list[int], b: GraphBuilder) -> ir.Value:
    return b.constant(np.array(numbers, np.uint8))
