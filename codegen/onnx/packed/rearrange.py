"""Rows of packed codes as rows of codes in another width or order, by tables of bytes.

Some stored bytes hold some whole codes, and these fill whole bytes of the new width. Each of the stored bytes has a
table of the new bytes that it would give with zeros beside it; the exclusive or of these entries is the result. Where a
code lies in two bytes, that needs new codes which are sums of what the bits of the old ones give, as integers with
another middle are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from moec.codegen.onnx.graph import GraphBuilder
from moec.ir.types import DType

Table = np.ndarray[tuple[int, ...], np.dtype[Any]]


@dataclass(frozen=True)
class Packing:
    """How codes lie in bytes: lowest bit first in `bits` each, or five digits of base 3 in a byte where it is None."""

    bits: int | None

    @property
    def unit(self) -> tuple[int, int]:
        """The least number of bytes that hold whole codes, and how many codes."""
        if self.bits is None:
            return 1, 5
        return (1, 8 // self.bits) if 8 % self.bits == 0 else (self.bits, 8)

    def bytes_of(self, columns: int) -> int:
        """Bytes of a row of so many codes."""
        return -(-columns // 5) if self.bits is None else -(-columns * self.bits // 8)

    def codes(self, place: int, count: int) -> Table:
        """The `count` codes, int64 [256, count], that bytes hold if that at `place` has each value and others are 0."""
        values = np.arange(256, dtype=np.uint64)[:, None]
        places = np.arange(count)
        if self.bits is None:
            digits = values // np.uint64(3) ** (places % 5).astype(np.uint64) % np.uint64(3)
            return np.where(places // 5 == place, digits, 0).astype(np.int64)
        shifts = (places * self.bits).astype(np.uint64)
        numbers = values << np.uint64(8 * place)
        return (numbers >> shifts & np.uint64((1 << self.bits) - 1)).astype(np.int64)


def rearrange(
    b: GraphBuilder, codes: ir.Value, columns: int, packing: Packing, table: Table, bits: int, nbytes: int
) -> ir.Value:
    """`table[code]`, `bits` (a divisor of 8) each, for `codes` u8 [rows, bytes]: u8, `nbytes` for each row.

    Its shape is not [rows, nbytes] where that would take a copy. What follows the last of the `columns` codes of a row
    has no meaning.
    """
    stored = packing.bytes_of(columns)
    if packing.bits == bits and np.array_equal(table, np.arange(len(table))):
        return _fitted(b, codes, stored, nbytes)
    run, count = packing.unit
    times = 8 // math.gcd(8, count * bits)
    run, count = run * times, count * times
    runs = -(-stored // run)
    whole = _fitted(b, codes, stored, runs * run)
    parts: tuple[ir.Value, ...] = (whole,)
    if run > 1:
        parts = b.ops("Split", b.reshape(whole, (-1, runs, run)), b.ints(*[1] * run), outputs=run, axis=2)
    result: ir.Value | None = None
    for place, part in enumerate(parts):
        entries = table[packing.codes(place, count)]
        if place:
            entries = entries ^ table[0]
        found = b.op("Gather", b.constant(_bytes(entries, bits)), b.cast(part, DType.I32), axis=0)
        result = found if result is None else b.op("BitwiseXor", result, found)
    assert result is not None
    made = runs * count * bits // 8
    return result if made == nbytes else _fitted(b, b.reshape(result, (-1, made)), made, nbytes)


def _bytes(codes: Table, bits: int) -> Table:
    """u8 [n, count * bits / 8] of codes [n, count]."""
    each = 8 // bits
    split = codes.reshape(len(codes), -1, each) << bits * np.arange(each)
    packed: Table = split.sum(-1).astype(np.uint8)
    return packed


def _fitted(b: GraphBuilder, rows: ir.Value, found: int, wanted: int) -> ir.Value:
    """The first `wanted` of `found` bytes of each row, or zeros behind them."""
    if found < wanted:
        return b.op("Pad", rows, b.ints(0, 0, 0, wanted - found), b.constant(np.array(0, np.uint8)))
    return rows if found == wanted else b.op("Slice", rows, b.ints(0), b.ints(wanted), b.ints(1))
