"""What reports say of packed experts."""

from __future__ import annotations

import torch

from moec.artifact.expert_facts import class_facts
from moec.dialects.moe import ExpertsOp, Routing
from moec.dialects.quant import BlockFloat, Integer, Levels, Span, Ternary, ZeroPoint
from tests.codegen.packed_matrices import expert, experts_module
from tests.codegen.running import module_of


def test_classes_name_their_formats_and_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    four, eight = Integer(4, Span.GROUP, 32, ZeroPoint.INTEGER), Integer(8)
    classes = [
        [expert([four] * 3, 64, 128, generator) for _ in range(3)],
        [expert([eight, eight, BlockFloat()], 64, 128, generator)],
        [expert([Ternary(Levels.EXTREMES)] * 3, 64, 128, generator)],
    ]
    module = module_of(*experts_module(classes, 64, routing=Routing(k=2)))
    layer = next(op for op in module.main.body if isinstance(op, ExpertsOp))
    first, second, third = class_facts(module, layer)
    # codes, a scale of 32 bits and a zero point of 4 for 32 weights
    assert first.body == "SwiGLU in int4 g32, 5.12 bits"
    assert first.bytes_per_expert == 3 * 64 * 128 * 5.125 / 8
    # gate and up: 8 bits and 32 for each row of 64; down: 4 bits and 8 for 32 weights
    bits = (2 * (8 + 32 / 64) + 4.25) / 3
    assert second.body == f"SwiGLU in int8 and MXFP4, {bits:.2f} bits"
    assert third.body.startswith("SwiGLU in ternary, 2.")
