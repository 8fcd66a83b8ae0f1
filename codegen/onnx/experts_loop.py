"""A class of experts as a loop over those that some token chose: for weights that are decoded when they are used.

What an expert costs here is its decoding, so an expert without rows must not be touched; and its operands are read by
an index that is not known before the model runs, so that no runtime decodes them when it loads the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from moec.codegen.onnx.context import Context
from moec.codegen.onnx.expert_body import BodyWalk
from moec.codegen.onnx.expert_products import Product, Stacks
from moec.codegen.onnx.expert_rows import ClassRows
from moec.codegen.onnx.packed.decode import decode
from moec.dialects.moe import ExpertsOp
from moec.ir.operation import Block
from moec.ir.types import DType


def emit_loop(
    context: Context, op: ExpertsOp, rows: ClassRows, hidden: int, block: Block, stacks: Sequence[Stacks]
) -> ir.Value:
    """The outputs [n, hidden] of a class of experts with the body `block`, in the order of its rows."""
    b = context.builder
    together, counts = rows.together(), rows.counts()
    ends = b.op("CumSum", counts, b.integer(0))
    used = b.reshape(b.op("NonZero", counts), (-1,))
    body = b.subgraph()
    step = body.input(body.unique("step"), DType.I64, ())
    running = body.input(body.unique("running"), DType.I1, ())
    outputs = body.input(body.unique("outputs"), DType.F32, ["rows", hidden])
    expert = body.op("Gather", used, step, axis=0)
    end = body.op("Gather", ends, body.reshape(expert, (1,)), axis=0)
    start = body.op("Sub", end, body.op("Gather", counts, body.reshape(expert, (1,)), axis=0))
    mine = body.op("Slice", together, start, end, body.ints(0))
    of_expert = OneExpertRows(body, mine, rows.slots, rows.number, expert)
    walk = _LoopWalk(replace(context, builder=body), op, of_expert)
    (found,) = walk.run(block, stacks)
    body.output(body.op("Identity", running), body.unique("still_running"), DType.I1, ())
    joined = body.op("Concat", outputs, found, axis=0)
    body.output(joined, body.unique("more_outputs"), DType.F32, ["more_rows", hidden])
    nothing = b.constant(np.zeros((0, hidden), np.float32))
    rounds = b.op("Squeeze", b.op("Shape", used), b.ints(0))
    return b.op("Loop", rounds, b.constant(np.array(True)), nothing, body=body.to_graph("expert"))


@dataclass(frozen=True)
class OneExpertRows(ClassRows):
    """The rows `x` [n, H] of the expert whose place in the class is the scalar `expert`."""

    expert: ir.Value

    @property
    def experts(self) -> int:
        """Experts whose rows they are."""
        return 1

    def by_expert(self) -> Sequence[ir.Value]:
        """The rows of each expert, of which there is one."""
        return (self.x,)

    def together(self) -> ir.Value:
        """The rows of all experts."""
        return self.x

    def total(self) -> ir.Value:
        """n as a one-element tensor."""
        return self.b.size(self.x, 0)


class _LoopWalk(BodyWalk):
    """Emits the body for the expert of one round; weights are read from their stacks at its place."""

    def __init__(self, context: Context, op: ExpertsOp, rows: OneExpertRows) -> None:
        super().__init__(context, op, rows, apart=True, each=False)
        self.expert = rows.expert

    def _share(self, product: Product) -> None:
        rows = self._value(product.rows)
        self.context.values[product.result] = self._multiply(rows, 0, product.weight, product.bias)

    def _multiply(self, rows: ir.Value, index: int, weight: Stacks, bias: Stacks | None) -> ir.Value:
        if weight.packed is None:
            matrix = self._of_expert(weight)
        else:
            matrix = decode(self.b, weight.packed.map(lambda _, stack: self._of_expert(stack, as_is=True)))
        return self.b.op("Gemm", rows, matrix, None if bias is None else self._of_expert(bias), transB=1)

    def _by_row(self, stack: Stacks) -> ir.Value:
        return self._of_expert(stack)

    def _of_expert(self, stack: Stacks, *, as_is: bool = False) -> ir.Value:
        """The weight of the round's expert; `as_is`: in the type that it is stored in."""
        if as_is:
            whole = self.context.stored_as_is(stack.expression, stack.name)
        else:
            whole = self.context.weight(stack.expression, stack.name, vectors=len(stack.shape) == 1)
        index = self.b.integer(0) if stack.is_shared else self.expert
        return self.b.op("Gather", whole, index, axis=0)
