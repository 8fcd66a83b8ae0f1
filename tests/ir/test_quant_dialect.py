"""Packed weights in the IR: text that comes back, and each rule of the verifier."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.dialects.quant import (
    BlockFloat,
    BlockScale,
    Codebook,
    DequantOp,
    Element,
    Format,
    Integer,
    Levels,
    Span,
    Ternary,
    TernaryDictionary,
    TritPacking,
    ZeroPoint,
    bits_per_weight,
)
from moec.ir import VerifyError, parse_module, print_operation, verify

TEXT = Path(__file__).with_name("packed_weights.mlir").read_text(encoding="utf-8")

# A piece of the text, what it becomes, and the message; each breaks one rule.
EDITS = {
    "nine bits": ("bits = 3", "bits = 9", "integers have 1 to 8 bits, not 9"),
    "groups that do not divide": ("group = 16, span", "group = 12, span", "groups of 12 do not divide rows of 32"),
    "a group without its span": ("group = 16, span = #quant.span<group>", "group = 16", "needs span = group"),
    "bytes of another width": ("tensor<4x12xui8>", "tensor<4x13xui8>", "a row of 32 weights takes 12 bytes"),
    "codes of another type": ("tensor<4x12xui8>", "tensor<4x12xi8>", "codes are bytes, ui8"),
    "scales of another shape": ("tensor<4x2xf16>", "tensor<4x3xf16>", "scales tensor<4x3xf16> are not 4x2"),
    "scales of another type": ("tensor<4x2xf16>", "tensor<4x2xf64>", "of f32, f16, bf16"),
    "no zero points": ("[1, 1, 1, 0, 0, 0]", "[1, 1, 0, 1, 0, 0]", "has no zero_points"),
    "a table of another size": ("tensor<16x1xf32>", "tensor<15x1xf32>", "has tensor<15x1xf32> as table"),
    "blocks of 64": ("#quant.block_float<>", "#quant.block_float<block = 64>", "blocks hold 16 or 32 weights"),
    "extremes of a group": (
        "levels = #quant.levels<extremes>, packing",
        "levels = #quant.levels<extremes>, group = 16, span = #quant.span<group>, packing",
        "extremes are those of a row",
    ),
    "a stream without offsets": ("[1, 1, 0, 1, 1, 0]", "[1, 1, 1, 1, 0, 0]", "a stream of codes needs offsets"),
    "codes of 17 bits": ("code_bits = 8", "code_bits = 17", "codes have 4 to 16 bits"),
    "a format of another kind": ("#quant.block_float<>", "#quant.span<row>", "format must be Format"),
    "no columns": ("columns = 40", "columns = 0", "0 columns"),
}


def test_text_comes_back() -> None:
    module = parse_module(TEXT)
    verify(module)
    assert print_operation(parse_module(print_operation(module))) == print_operation(module)
    assert sum(isinstance(op, DequantOp) for op in module.walk()) == 6


@pytest.mark.parametrize("name", list(EDITS))
def test_rule(name: str) -> None:
    old, new, message = EDITS[name]
    assert TEXT.count(old) >= 1
    with pytest.raises(VerifyError) as caught:
        verify(parse_module(TEXT.replace(old, new)))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Integer(4, Span.GROUP, 32), 5.0),
        (Integer(4, Span.GROUP, 32, ZeroPoint.INTEGER), 5.125),
        (Integer(3, Span.ROW), 3 + 32 / 128),
        (Integer(1, Span.GROUP, 64, ZeroPoint.FLOAT), 2.0),
        (Ternary(Levels.EXTREMES), 2 + 64 / 128),
        (Ternary(Levels.SCALE, Span.TENSOR, packing=TritPacking.FIVE_PER_BYTE), 26 * 8 / 128 + 32 / (64 * 128)),
        (Codebook(4, 1, Span.GROUP, 64), 4.5),
        (Codebook(8, 8, Span.ROW), 1 + 32 / 128),
        (BlockFloat(Element.E2M1, 32, BlockScale.E8M0), 4.25),
        (BlockFloat(Element.E2M1, 16, BlockScale.E4M3), 4.5),
    ],
)
def test_bits_per_weight(kind: Format, expected: float) -> None:
    assert kind.problem(128) is None
    assert bits_per_weight(kind, 64, 128) == pytest.approx(expected)


def test_a_stream_has_no_bytes_per_row() -> None:
    assert TernaryDictionary(12).row_bytes(128) == 0
    assert TernaryDictionary(12, Levels.SCALE, Span.TENSOR).scale_shape(64, 128) == (1, 1)
