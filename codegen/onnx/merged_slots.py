"""Slots of one token that lead to the same expert, through several router outputs: computed once, with the gates added.

It takes a dozen small nodes, so it is done where enough tokens run at once that their rows cost more. One token alone
reads the expert's weights once anyway.
"""

from __future__ import annotations

from math import comb

import numpy as np
import onnx_ir as ir

from moec.codegen.onnx.cost_model import MERGED_SLOTS, ExpertsShape, multiplication_seconds
from moec.codegen.onnx.graph import GraphBuilder
from moec.dialects.moe import ExpertsOp


def merging_pays(op: ExpertsOp, shape: ExpertsShape, tokens: int) -> bool:
    """Whether merging costs less than the rows that it saves, for a run of `tokens` tokens."""
    rows = tokens * shape.slots * repeated_share(op.stored, shape.slots)
    return multiplication_seconds(rows, shape.matrix_elements) > MERGED_SLOTS


def repeated_share(stored: tuple[int, ...], slots: int) -> float:
    """The share of slots whose expert an earlier slot of the token has, if `slots` outputs are chosen at random."""
    outputs = len(stored)
    named = [stored.count(expert) for expert in set(stored) - {-1}]
    if not 1 <= slots <= outputs or max(named, default=1) == 1:
        return 0.0
    # an expert is missed if all slots go to other outputs
    distinct = sum(1 - comb(outputs - count, slots) / comb(outputs, slots) for count in named)
    return (slots * sum(named) / outputs - distinct) / slots


def merge_slots(
    b: GraphBuilder, targets: ir.Value, gates: ir.Value, slots: int, nowhere: int
) -> tuple[ir.Value, ir.Value]:
    """(targets, gates) [T, K]: each expert only at its first slot, with all its gates; `nowhere` at the others."""
    same = b.op("Equal", b.op("Unsqueeze", targets, b.ints(2)), b.op("Unsqueeze", targets, b.ints(1)))
    weights = b.op("Cast", same, to=ir.DataType.FLOAT)
    total = b.op("Squeeze", b.op("MatMul", weights, b.op("Unsqueeze", gates, b.ints(2))), b.ints(2))
    earlier = b.constant(np.tril(np.ones((slots, slots), np.float32), -1))
    repeats = b.op("ReduceSum", b.op("Mul", weights, earlier), b.ints(2), keepdims=0)
    again = b.op("Greater", repeats, b.number(0.0))
    return b.op("Where", again, b.integer(nowhere), targets), total
