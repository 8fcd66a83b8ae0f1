"""The parallel form of a block: attention and feed-forward both read what comes into it."""

from __future__ import annotations

from moec.dialects.nn import LayerNormOp, RMSNormOp
from moec.experts.dense import DenseLayer
from moec.ir import Operation, Value
from moec.passes.matching import made_by
from moec.passes.upcycling.attention import AttentionBlock


def make_parallel(layer: DenseLayer, blocks: list[AttentionBlock]) -> bool:
    """Lets the feed-forward block's norm read x instead of x + Attn(x); False where it does not read such a sum.

    A model whose blocks are parallel already has nothing to change. The block keeps its own norm.
    """
    norm: Operation | None = layer.op.x.defining_op
    if not isinstance(norm, RMSNormOp | LayerNormOp):
        return False
    total = made_by(norm.operands[0], "add.Tensor")
    if total is None:
        return False
    outputs = {block.output.result for block in blocks}
    for attended, rest in (total.operands, total.operands[::-1]):
        if attended in outputs and _comes_into(rest, blocks, attended):
            norm.set_operand(0, rest)
            return True
    return False


def _comes_into(value: Value, blocks: list[AttentionBlock], attended: Value) -> bool:
    """Whether the norm in front of the attention that gives `attended` reads `value`."""
    block = next(item for item in blocks if item.output.result is attended)
    norm = block.rows.defining_op
    return norm is not None and norm.operands[0] is value
