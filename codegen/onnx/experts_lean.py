"""`moe.experts` in ai.onnx, the lean form: slots sorted by expert, one product per expert and weight, all else once.

`Split` hands every expert its rows; an expert without rows costs one empty product; what has no weights (activations,
gates) runs once on all rows. Two or three products per expert and some thirty other nodes make a layer. Measured
against other forms it is at the machine's limit (`tests/benchmarks/lowerings.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moec.codegen.onnx.context import Context, refuse, tensor_of
from moec.codegen.onnx.cost_model import ONE_NODE_EXPERTS
from moec.codegen.onnx.expert_body import BodyWalk, Rows
from moec.codegen.onnx.expert_products import Stacks
from moec.codegen.onnx.graph import GraphBuilder
from moec.dialects.moe import ExpertsOp, RouteOp, Select
from moec.ir.operation import Value

# In the portable form a layer is to have no more than 2 E + 40 nodes, so only few experts can have three each.
PORTABLE_APART_EXPERTS = 9


@dataclass(frozen=True)
class SortedSlots:
    """Slots in order of the expert they go to.

    `positions` int64 [N]: the expert of each sorted slot, experts counted class by class; `counts` int64 [P]: slots of
    each expert, and last of those that go nowhere if `has_empty`; `inverse` int64 [N]: where a slot went; `tokens`
    int64 [N]: the token of a sorted slot.
    """

    positions: ir.Value
    counts: ir.Value
    inverse: ir.Value
    tokens: ir.Value
    has_empty: bool


def emit_lean(context: Context, op: ExpertsOp) -> ir.Value:
    """The sum over slots of gate times expert, [T, H]."""
    b = context.builder
    x, ids, gates = (context.value(value) for value in (op.x, op.ids, op.gates))
    slots_per_token = static_size(op, tensor_of(op.ids).shape[1])
    hidden = static_size(op, tensor_of(op.x).shape[1])
    slots = sort_slots(b, op, ids, gates)
    rows = b.op("Gather", x, slots.tokens, axis=0)
    outputs = class_outputs(context, op, rows, slots)
    y = outputs[0] if len(outputs) == 1 else b.op("Concat", *outputs, axis=0)
    by_slot = b.reshape(b.op("Gather", y, slots.inverse, axis=0), (-1, slots_per_token, hidden))
    weighted = b.op("MatMul", b.op("Unsqueeze", gates, b.ints(1)), by_slot)
    return b.op("Squeeze", weighted, b.ints(1))


def sort_slots(b: GraphBuilder, op: ExpertsOp, ids: ir.Value, gates: ir.Value) -> SortedSlots:
    """Sorts the slots of all tokens by expert; stable, because TopK puts the lower index first among equals."""
    table = expert_positions(op)
    experts = op.expert_count
    has_empty = may_leave_slots_empty(op.ids) or experts in table
    keys = b.reshape(ids, (-1,))
    if not np.array_equal(table, np.arange(len(table))):
        keys = b.op("Gather", b.constant(table), keys, axis=0)
    if may_leave_slots_empty(op.ids):
        unused = b.op("Equal", b.reshape(gates, (-1,)), b.number(0.0))
        keys = b.op("Where", unused, b.integer(experts), keys)
    total = b.op("Shape", keys)
    positions, order = b.ops("TopK", keys, total, outputs=2, axis=0, largest=0, sorted=1)
    steps = b.op("Range", b.integer(0), b.op("Squeeze", total, b.ints(0)), b.integer(1))
    inverse = b.op("ScatterElements", order, order, steps, axis=0)
    ones = b.op("ConstantOfShape", total, value=ir.tensor(np.ones(1, np.int64)))
    none = b.constant(np.zeros(experts + has_empty, np.int64))
    counts = b.op("ScatterElements", none, keys, ones, axis=0, reduction="add")
    slots_per_token = static_size(op, tensor_of(op.ids).shape[1])
    tokens = order if slots_per_token == 1 else b.op("Div", order, b.integer(slots_per_token))
    return SortedSlots(positions, counts, inverse, tokens, has_empty)


def class_outputs(context: Context, op: ExpertsOp, rows: ir.Value, slots: SortedSlots) -> list[ir.Value]:
    """What each class of experts makes of its rows, in order; rows of empty slots become zero."""
    b = context.builder
    sizes = [len(group.experts) for group in op.classes] + ([1] if slots.has_empty else [])
    if len(sizes) == 1:
        whole = Rows(rows, slots.counts, slots.positions, sizes[0])
        return [_class_output(context, op, 0, whole)]
    counts = b.ops("Split", slots.counts, b.ints(*sizes), outputs=len(sizes), axis=0)
    totals = b.op("Concat", *[b.op("ReduceSum", count, b.ints(0), keepdims=1) for count in counts], axis=0)
    parts = b.ops("Split", rows, totals, outputs=len(sizes), axis=0)
    positions = b.ops("Split", slots.positions, totals, outputs=len(sizes), axis=0)
    outputs = []
    first = 0
    for number, size in enumerate(sizes):
        local = b.op("Sub", positions[number], b.integer(first)) if first else positions[number]
        first += size
        if number < len(op.classes):
            outputs.append(_class_output(context, op, number, Rows(parts[number], counts[number], local, size)))
        else:
            outputs.append(b.op("Expand", b.number(0.0), b.op("Shape", parts[number])))
    return outputs


def _class_output(context: Context, op: ExpertsOp, number: int, rows: Rows) -> ir.Value:
    _, stacks, region = list(op.class_operands())[number]
    with context.builder.scope(f"class_{number}" if len(op.classes) > 1 else "experts"):
        walk = BodyWalk(context, op, rows, apart=_apart(context, op))
        return walk.run(region.block, [stacks_of(context, op, value) for value in stacks])


def _apart(context: Context, op: ExpertsOp) -> bool:
    """Whether gate and up are products of their own."""
    if context.options.weights_in_place:
        # half a tensor of the checkpoint may not be what lies in one piece there
        return False
    limit = ONE_NODE_EXPERTS if context.options.target.profile.contrib else PORTABLE_APART_EXPERTS
    return op.expert_count < limit


def stacks_of(context: Context, op: ExpertsOp, value: Value) -> Stacks:
    """The stack that an operand of `moe.experts` names; raises UnsupportedModelError where it is computed."""
    named = context.named_weight(value)
    if named is None:
        raise refuse(op, "a stack of expert weights is not a weight of the model")
    kind = tensor_of(value)
    return Stacks(named.expression, named.name, kind.static_shape[1:])


def expert_positions(op: ExpertsOp) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """For each router output, its expert's place when experts are counted class by class; null experts come last."""
    order = [expert for group in op.classes for expert in group.experts]
    place = {expert: position for position, expert in enumerate(order)}
    return np.array([place.get(expert, len(order)) for expert in op.stored], np.int64)


def may_leave_slots_empty(ids: Value) -> bool:
    """Whether the route that made `ids` can select fewer experts than there are slots."""
    route = ids.defining_op
    if not isinstance(route, RouteOp):
        return False
    routing = route.routing
    fixed = routing.select in (Select.TOPK, Select.PER_GROUP_TOPK, Select.SPARSEMIXER)
    return (
        not fixed or bool(routing.skip_ratio) or bool(routing.null_experts) or routing.slots(route.experts) != routing.k
    )


def static_size(op: ExpertsOp, size: object) -> int:
    """A size that has to be a number; raises UnsupportedModelError."""
    if not isinstance(size, int):
        raise refuse(op, f"the size {size} must be known when compiling")
    return size
