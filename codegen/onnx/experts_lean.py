"""`moe.experts` in ai.onnx, the lean form: slots sorted by expert, one product per expert and weight, all else once.

`Split` hands every expert its rows; an expert without rows costs one empty product; what has no weights (activations,
gates) runs once on all rows of a class, or expert by expert in a large layer of the target ort-cpu. Two or three
products per expert and some thirty other nodes make a layer of equal experts. Measured against other forms it is at the
machine's limit (`tests/benchmarks/lowerings.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from moec.codegen.onnx.context import Context, refuse, tensor_of
from moec.codegen.onnx.cost_model import ONE_NODE_EXPERTS, computes_each
from moec.codegen.onnx.expert_body import BodyWalk
from moec.codegen.onnx.expert_products import Stacks, find_products, shared_stack
from moec.codegen.onnx.expert_rows import ClassRows, SortedSlots, experts_shape, sort_slots, static_size
from moec.codegen.onnx.experts_loop import emit_loop
from moec.codegen.onnx.merged_slots import merging_pays
from moec.codegen.onnx.packed.product import usable_form
from moec.dialects.moe import ExpertClass, ExpertsOp
from moec.dialects.quant import DequantOp
from moec.ir.operation import Block, Value

# In the portable form a layer is to have no more than 2 E + 40 nodes, so only few experts can have three each.
PORTABLE_APART_EXPERTS = 9


def emit_lean(context: Context, op: ExpertsOp) -> ir.Value:
    """The sum over slots of gate times expert, [T, H]."""
    b = context.builder
    x, ids, gates = (context.value(value) for value in (op.x, op.ids, op.gates))
    if not op.expert_count:
        return b.op("Expand", b.number(0.0), b.op("Shape", x))
    slots_per_token = static_size(op, tensor_of(op.ids).shape[1])
    hidden = static_size(op, tensor_of(op.x).shape[1])
    merged = merging_pays(op, experts_shape(op), context.options.tokens)
    slots = sort_slots(b, op, ids, gates, merged=merged)
    outputs = [piece for number in range(len(op.classes)) for piece in _class_output(context, op, x, slots, number)]
    if slots.has_empty:
        nowhere = b.op("Slice", slots.counts, b.ints(op.expert_count), b.ints(op.expert_count + 1))
        outputs.append(b.op("Expand", b.number(0.0), b.op("Concat", nowhere, b.ints(hidden), axis=0)))
    y = outputs[0] if len(outputs) == 1 else b.op("Concat", *outputs, axis=0)
    by_slot = b.reshape(b.op("Gather", y, slots.inverse, axis=0), (-1, slots_per_token, hidden))
    weighted = b.op("MatMul", b.op("Unsqueeze", slots.gates, b.ints(1)), by_slot)
    return b.op("Squeeze", weighted, b.ints(1))


def _class_output(
    context: Context, op: ExpertsOp, x: ir.Value, slots: SortedSlots, number: int
) -> tuple[ir.Value, ...]:
    """What a class of experts makes of its rows, in pieces that follow each other."""
    _, _, region = list(op.class_operands())[number]
    with context.builder.scope(f"class_{number}" if len(op.classes) > 1 else "experts"):
        rows = ClassRows(context.builder, x, slots, number)
        stacks = class_stacks(context, op, number)
        if decodes(context, region.block, stacks):
            hidden = static_size(op, tensor_of(op.x).shape[1])
            return (emit_loop(context, op, rows, hidden, region.block, stacks),)
        apart = _apart(context, op)
        walk = BodyWalk(context, op, rows, apart=apart, each=apart and _each(context, op))
        return walk.run(region.block, stacks)


def has_packed_weights(op: ExpertsOp) -> bool:
    """Whether some expert has a packed matrix."""
    return any(isinstance(inner, DequantOp) for region in op.regions for inner in region.block)


def decodes_any(context: Context, op: ExpertsOp) -> bool:
    """Whether some class of experts is decoded when the model runs."""
    classes = enumerate(op.class_operands())
    return any(decodes(context, region.block, class_stacks(context, op, n)) for n, (_, _, region) in classes)


def decodes(context: Context, block: Block, stacks: Sequence[Stacks]) -> bool:
    """Whether experts with the body `block` have a packed matrix that the target can only decode."""
    matrices = [product.weight.packed for product in find_products(block, stacks).products]
    return any(packed and usable_form(context, packed.format, packed.columns) is None for packed in matrices)


def _apart(context: Context, op: ExpertsOp) -> bool:
    """Whether gate and up are products of their own."""
    if context.options.weights_in_place:
        return False  # where the tensors of the checkpoint are apart, the walk sees it
    limit = ONE_NODE_EXPERTS if context.options.target.profile.contrib else PORTABLE_APART_EXPERTS
    common = context.common.get(op)
    return (op.expert_count if common is None else common.most_experts) < limit


def _each(context: Context, op: ExpertsOp) -> bool:
    """Whether activations are computed expert by expert; the portable form has no nodes to spare for that."""
    return context.options.target.profile.contrib and computes_each(op.expert_count, context.plans[op].choice)


def class_stacks(context: Context, op: ExpertsOp, number: int) -> list[Stacks]:
    """The weights of a class, in the order of the arguments of its body.

    Raises UnsupportedModelError where one is computed when the model runs.
    """
    group, values, _ = list(op.class_operands())[number]
    found = []
    for position, value in enumerate(values):
        named = context.named_weight(value)
        if named is None:
            raise refuse(op, "a weight of its experts is not a weight of the model")
        shape = tensor_of(value).static_shape
        if position < group.stacks:
            found.append(Stacks(named.expression, named.name, shape[1:]))
        else:
            found.append(shared_stack(named.expression, named.name, shape, _rows_per_token(op, value)))
    return found


def _rows_per_token(op: ExpertsOp, weight: Value) -> float:
    """How many slots of a token go on average to an expert that shares `weight`, if the router prefers none."""
    sharing: list[ExpertClass] = [group for group, values, _ in op.class_operands() if weight in values[group.stacks :]]
    outputs = sum(op.stored.count(expert) for group in sharing for expert in group.experts)
    return static_size(op, tensor_of(op.ids).shape[1]) * outputs / max(1, len(op.stored))
