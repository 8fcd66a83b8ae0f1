"""Slots of all tokens in order of the expert they go to, and the rows of each class of experts among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moec.codegen.onnx.context import refuse, tensor_of
from moec.codegen.onnx.cost_model import ExpertsShape
from moec.codegen.onnx.graph import GraphBuilder
from moec.codegen.onnx.merged_slots import merge_slots
from moec.dialects.moe import ExpertsOp, ReplicaOp, RouteOp, Select
from moec.dialects.quant import DequantOp
from moec.ir.operation import Value


@dataclass(frozen=True)
class SortedSlots:
    """Slots in order of the expert they go to.

    `positions` int64 [N]: the expert of each sorted slot, experts counted class by class; `counts` int64 [P]: slots of
    each expert, and last of those that go nowhere if `has_empty`; `inverse` int64 [N]: where a slot went; `tokens`
    int64 [N]: the token of a sorted slot; `gates` [T, K]: what each slot counts; `sizes`: experts of each class, and
    last 1 if `has_empty`; `totals` int64 [classes]: slots of each class, and last of those that go nowhere.
    """

    positions: ir.Value
    counts: ir.Value
    inverse: ir.Value
    tokens: ir.Value
    gates: ir.Value
    has_empty: bool
    sizes: tuple[int, ...]
    totals: ir.Value


def sort_slots(b: GraphBuilder, op: ExpertsOp, ids: ir.Value, gates: ir.Value, *, merged: bool) -> SortedSlots:
    """Sorts the slots of all tokens by expert; stable, because TopK puts the lower index first among equals.

    `merged`: slots of a token that lead to the same expert become one.
    """
    table = expert_positions(op)
    experts = op.expert_count
    slots_per_token = static_size(op, tensor_of(op.ids).shape[1])
    has_empty = merged or may_leave_slots_empty(op.ids) or experts in table
    keys = ids if merged else b.reshape(ids, (-1,))
    if not np.array_equal(table, np.arange(len(table))):
        keys = b.op("Gather", b.constant(table), keys, axis=0)
    if merged:
        keys, gates = merge_slots(b, keys, gates, slots_per_token, experts)
        keys = b.reshape(keys, (-1,))
    if may_leave_slots_empty(op.ids):
        unused = b.op("Equal", b.reshape(gates, (-1,)), b.number(0.0))
        keys = b.op("Where", unused, b.integer(experts), keys)
    total = b.op("Shape", keys)
    positions, order = b.ops("TopK", keys, total, outputs=2, axis=0, largest=0, sorted=1)
    steps = b.op("Range", b.integer(0), b.op("Squeeze", total, b.ints(0)), b.integer(1))
    inverse = b.op("ScatterElements", order, order, steps, axis=0)
    ones = b.op("ConstantOfShape", total, value=ir.tensor(np.ones(1, np.int64)))
    counts = _counted(b, keys, ones, experts + has_empty)
    sizes = (*[len(group.experts) for group in op.classes], *[1] * has_empty)
    totals = counts
    if any(size != 1 for size in sizes):
        class_of = np.repeat(np.arange(len(sizes)), sizes)
        totals = _counted(b, b.op("Gather", b.constant(class_of), keys, axis=0), ones, len(sizes))
    tokens = order if slots_per_token == 1 else b.op("Div", order, b.integer(slots_per_token))
    return SortedSlots(positions, counts, inverse, tokens, gates, has_empty, sizes, totals)


def _counted(b: GraphBuilder, keys: ir.Value, ones: ir.Value, size: int) -> ir.Value:
    """How often each of 0 .. size - 1 is among the keys."""
    return b.op("ScatterElements", b.constant(np.zeros(size, np.int64)), keys, ones, axis=0, reduction="add")


@dataclass(frozen=True)
class ClassRows:
    """The rows of one class, sorted by expert: those of all tokens `x` [T, H] at the slots of the class.

    Each method emits what it gives when it is first called, so that nothing is cut out that no body reads.
    """

    b: GraphBuilder
    x: ir.Value
    slots: SortedSlots
    number: int

    @property
    def experts(self) -> int:
        """Experts in the class."""
        return self.slots.sizes[self.number]

    def by_expert(self) -> Sequence[ir.Value]:
        """The rows of each expert, [count, H]."""
        start = self._first
        return self._split(self._rows(), self.slots.counts, sum(self.slots.sizes))[start : start + self.experts]

    def together(self) -> ir.Value:
        """The rows of all experts, [n, H]."""
        return self._of_class(self._rows())

    def tokens(self) -> ir.Value:
        """The token of each row, int64 [n]."""
        return self._of_class(self.slots.tokens)

    def expert_of_row(self) -> ir.Value:
        """The place in the class of each row's expert, int64 [n]."""
        positions = self._of_class(self.slots.positions)
        return self.b.op("Sub", positions, self.b.integer(self._first)) if self._first else positions

    def counts(self) -> ir.Value:
        """Rows of each expert, int64 [experts]."""
        return self._part(self.slots.counts, self._first, self.experts, sum(self.slots.sizes))

    def total(self) -> ir.Value:
        """n as a one-element tensor."""
        if len(self.slots.sizes) == 1:
            return self.b.op("Shape", self.slots.positions)
        return self._part(self.slots.totals, self.number, 1, len(self.slots.sizes))

    @property
    def _first(self) -> int:
        return sum(self.slots.sizes[: self.number])

    def _rows(self) -> ir.Value:
        return self.b.op("Gather", self.x, self.slots.tokens, axis=0)

    def _of_class(self, values: ir.Value) -> ir.Value:
        return self._split(values, self.slots.totals, len(self.slots.sizes))[self.number]

    def _split(self, values: ir.Value, sizes: ir.Value, parts: int) -> Sequence[ir.Value]:
        return (values,) if parts == 1 else self.b.ops("Split", values, sizes, outputs=parts, axis=0)

    def _part(self, values: ir.Value, start: int, size: int, whole: int) -> ir.Value:
        if size == whole:
            return values
        return self.b.op("Slice", values, self.b.ints(start), self.b.ints(start + size))


def expert_positions(op: ExpertsOp) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """For each router output, its expert's place when experts are counted class by class; null experts come last."""
    order = [expert for group in op.classes for expert in group.experts]
    place = {expert: position for position, expert in enumerate(order)}
    return np.array([place.get(expert, len(order)) for expert in op.stored], np.int64)


def may_leave_slots_empty(ids: Value) -> bool:
    """Whether the route that made `ids` can select fewer experts than there are slots."""
    route = ids.defining_op
    if isinstance(route, ReplicaOp):
        return route.low < 1 or may_leave_slots_empty(route.ids)
    if not isinstance(route, RouteOp):
        return False
    routing = route.routing
    fixed = routing.select in (Select.TOPK, Select.PER_GROUP_TOPK, Select.SPARSEMIXER)
    return (
        not fixed or bool(routing.skip_ratio) or bool(routing.null_experts) or routing.slots(route.experts) != routing.k
    )


def experts_shape(op: ExpertsOp) -> ExpertsShape:
    """The sizes that the cost model reads."""
    elements = 0
    for group, weights, region in op.class_operands():
        matrices = [inner for inner in region.block if isinstance(inner, DequantOp)]
        elements += sum(len(group.experts) * math.prod(tensor_of(inner.weight).static_shape) for inner in matrices)
        packed = {operand for inner in matrices for operand in inner.operands}
        for position, (value, argument) in enumerate(zip(weights, region.block.arguments[1:], strict=True)):
            repeats = 1 if position < group.stacks else len(group.experts)
            if argument not in packed:
                elements += repeats * math.prod(tensor_of(value).static_shape)
    slots = static_size(op, tensor_of(op.ids).shape[1])
    return ExpertsShape(max(1, op.expert_count), slots, elements / max(1, op.expert_count))


def static_size(op: ExpertsOp, size: object) -> int:
    """A size that has to be a number; raises UnsupportedModelError."""
    if not isinstance(size, int):
        raise refuse(op, f"the size {size} must be known when compiling")
    return size
