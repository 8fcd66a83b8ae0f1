"""Packed trits in another packing, with the same levels: two bits, five in a byte, or the codes of a dictionary."""

from __future__ import annotations

from dataclasses import replace

import torch

from moec.dialects.quant import Ternary, TernaryDictionary, TritPacking
from moec.quantization.dictionary import Dictionary, encode_rows, pack_stream
from moec.quantization.packed import Packed, pack_codes


def repacked(packed: Packed, packing: TritPacking) -> Packed:
    """The matrix, which is `Ternary`, with its trits packed so."""
    assert isinstance(packed.format, Ternary)
    kind = replace(packed.format, packing=packing)
    return replace(packed, format=kind, codes=pack_codes(kind, packed.integer_codes()))


def encoded(packed: Packed, dictionary: Dictionary, table: torch.Tensor) -> Packed:
    """The matrix, which is `Ternary` without groups, as a stream; `table` is that of the dictionary."""
    kind = packed.format
    assert isinstance(kind, Ternary) and not kind.group
    codes, offsets = encode_rows(packed.integer_codes(), dictionary)
    stream = pack_stream(codes, dictionary.code_bits)
    stands_for = TernaryDictionary(dictionary.code_bits, kind.levels, kind.span)
    return Packed(stands_for, packed.columns, stream, packed.scales, table=table, offsets=offsets)


def padded(packed: Packed, size: int) -> Packed:
    """A stream with zero bytes behind it, `size` in all."""
    return replace(packed, codes=torch.nn.functional.pad(packed.codes, (0, size - len(packed.codes))))


def zero_share(packed: Packed) -> float:
    """The share of trits that are zero."""
    return float((packed.integer_codes() == 0).double().mean())
