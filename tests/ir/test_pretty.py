"""The short form for people."""

from __future__ import annotations

from pathlib import Path

from moec.ir import parse_module
from moec.ir.pretty import print_pretty
from tests.benchmarks.ir import large_module

ALL_OPERATIONS = Path(__file__).with_name("all_operations.mlir")


def test_a_layer() -> None:
    lines = print_pretty(large_module(10)).splitlines()
    assert lines[0] == "main(%x: [batch, seq, 64] f32) -> y:"
    assert "  %4 = nn.rms_norm %x, %0 {epsilon = 1e-06} : [batch, seq, 64] f32   // model.layers.0" in lines
    route = next(line for line in lines if "moe.route" in line)
    assert "k = 2, normalize = sum" in route and "operandSegmentSizes" not in route
    body = lines[lines.index(next(line for line in lines if "moe.experts" in line)) + 1]
    assert body == "    (%11: [tokens, 64] f32, %12: [96, 64] f32, %13: [64, 48] f32):"
    assert lines[-1] == "  return %21"


def test_absent_operands_are_told_apart() -> None:
    text = print_pretty(parse_module(ALL_OPERATIONS.read_text(encoding="utf-8")))
    forced = next(line for line in text.splitlines() if "select = forced" in line)
    assert "moe.route %logits, forced_ids=%forced" in forced
    assert all(len(line) < 400 for line in text.splitlines())
