"""Random experts for tests of what works on their tensors."""

from __future__ import annotations

from dataclasses import replace

import torch

from moec.dialects import aten
from moec.dialects.moe import YieldOp
from moec.dialects.nn import TOKENS
from moec.experts import Activation, Dense, FeedForward, Projection
from moec.experts.expert import WIDTH
from moec.ir import Block, DType, TensorType


def gated_silu() -> Activation:
    """silu(gate) * up."""
    kind = TensorType((TOKENS, WIDTH), DType.F32)
    block = Block([kind, kind])
    gate, up = block.arguments
    silu = aten.build("silu.default", {"self": gate}, (kind,))
    block.append(silu)
    product = aten.build("mul.Tensor", {"self": silu.result, "other": up}, (kind,))
    block.append(product)
    block.append(YieldOp([product.result], result_types=[]))
    return Activation(True, ("silu", "mul"), block)


def squared_relu() -> Activation:
    """relu(up)^2, without a gate."""
    kind = TensorType((TOKENS, WIDTH), DType.F32)
    block = Block([kind])
    relu = aten.build("relu.default", {"self": block.arguments[0]}, (kind,))
    block.append(relu)
    square = aten.build("square.default", {"self": relu.result}, (kind,))
    block.append(square)
    block.append(YieldOp([square.result], result_types=[]))
    return Activation(False, ("relu", "square"), block)


GATED = gated_silu()
UNGATED = squared_relu()


def random_expert(
    seed: int, width: int = 12, hidden: int = 8, *, bias: bool = False, gated: bool = True
) -> FeedForward:
    generator = torch.Generator().manual_seed(seed)

    def projection(outputs: int, inputs: int) -> Projection:
        matrix = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        return Projection(Dense(matrix), torch.randn(outputs, generator=generator) if bias else None)

    gate = projection(width, hidden) if gated else None
    up, down = projection(width, hidden), projection(hidden, width)
    return FeedForward(GATED if gated else UNGATED, gate, up, down)


def permuted(expert: FeedForward, order: torch.Tensor) -> FeedForward:
    """The same function with its neurons in another order."""

    def rows(projection: Projection) -> Projection:
        bias = None if projection.bias is None else projection.bias[order]
        return Projection(Dense(projection.dense()[order]), bias)

    gate = None if expert.gate is None else rows(expert.gate)
    down = replace(expert.down, matrix=Dense(expert.down.dense()[:, order]))
    return FeedForward(expert.activation, gate, rows(expert.up), down)
