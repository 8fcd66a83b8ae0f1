"""`moe.replica` in ai.onnx: comparisons of the gates of a token with each other."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from moec.codegen.onnx.context import tensor_of
from moec.codegen.onnx.graph import GraphBuilder
from moec.dialects.moe import ReplicaOp


def emit_replica(b: GraphBuilder, op: ReplicaOp, ids: ir.Value, gates: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Ids int64 [T, K] and gates float32 [T, K]."""
    slots = tensor_of(op.ids).shape[1]
    assert isinstance(slots, int)
    sizes = b.op("Abs", gates)
    own, other = b.op("Unsqueeze", sizes, b.ints(2)), b.op("Unsqueeze", sizes, b.ints(1))
    earlier = b.constant(np.tril(np.ones((1, slots, slots), np.bool_), -1))
    counts_more = b.op("Or", b.op("Greater", other, own), b.op("And", b.op("Equal", other, own), earlier))
    before = b.op("ReduceSum", b.op("Where", counts_more, other, b.number(0.0)), b.ints(2), keepdims=0)
    total = b.op("ReduceSum", sizes, b.ints(1), keepdims=1)
    chosen = b.op("Where", _within(b, before, total, op.high), ids, b.op("Add", ids, b.integer(op.outputs)))
    if op.low >= 1:
        return chosen, gates
    return chosen, b.op("Where", _within(b, before, total, op.low), gates, b.number(0.0))


def _within(b: GraphBuilder, before: ir.Value, total: ir.Value, share: float) -> ir.Value:
    return b.op("LessOrEqual", before, b.op("Mul", total, b.number(share)))
