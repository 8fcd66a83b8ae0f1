"""Emission of the moe dialect: routes in ai.onnx, experts in the form that the cost model chose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from moec.codegen.onnx.context import Context, reshape_target, tensor_of
from moec.codegen.onnx.cost_model import Choice, Lowering
from moec.codegen.onnx.experts_fused import emit_fused
from moec.codegen.onnx.experts_lean import emit_lean
from moec.codegen.onnx.experts_packed_fused import emit_packed_fused
from moec.codegen.onnx.lean_function import emit_lean_function
from moec.codegen.onnx.registry import emits_op
from moec.codegen.onnx.replica import emit_replica
from moec.codegen.onnx.route import RouteOperands, emit_route
from moec.dialects.moe import ExpertsOp, ReplicaOp, RouteOp
from moec.ir.operation import Operation

if TYPE_CHECKING:
    from moec.codegen.onnx.expert_plan import ExpertsPlan


@dataclass(frozen=True)
class LayerLowering:
    """How one `moe.experts` was emitted.

    `nodes` are those of the main graph, `parity` is the difference that the parity gate saw (None: no gate), `shared`
    the number of experts that stand for a shared one inside the fused node.
    """

    layer: str
    choice: Choice
    experts: int
    nodes: int
    parity: float | None
    shared: int = 0


@emits_op(RouteOp)
def emit_route_op(context: Context, op: RouteOp) -> tuple[ir.Value, ...]:
    """`moe.route`: ids, gates and, where something reads it, count."""
    operands = RouteOperands(
        context.value(op.logits),
        context.optional(op.logit_bias),
        context.optional(op.mask),
        context.optional(op.score_override),
        context.optional(op.override_on),
        context.optional(op.select_bias),
        context.optional(op.forced_ids),
        context.optional(op.per_expert_scale),
    )
    slots = emit_route(context.builder, op, operands)
    if not op.count.uses:
        return slots.ids, slots.gates
    return slots.ids, slots.gates, slots.count(context.builder)


@emits_op(ReplicaOp)
def emit_replica_op(context: Context, op: ReplicaOp) -> tuple[ir.Value, ...]:
    """`moe.replica`: ids and gates of the replicas that slots read."""
    return emit_replica(context.builder, op, context.value(op.ids), context.value(op.gates))


@emits_op(ExpertsOp)
def emit_experts(context: Context, op: ExpertsOp) -> ir.Value:
    """`moe.experts`, in the form that was planned."""
    return _emit_layer(context, op)


def _emit_layer(context: Context, op: ExpertsOp) -> ir.Value:
    plan = context.plans[op]
    before = len(context.builder.nodes)
    # what is not one expert's own, such as a stack of all of them, comes before those
    with context.builder.expert(len(context.lowerings)):
        result = _emit_form(context, op, plan)
    nodes = len(context.builder.nodes) - before
    layer = op.location.name or f"experts {len(context.lowerings)}"
    context.lowerings.append(LayerLowering(layer, plan.choice, op.expert_count, nodes, plan.parity, plan.shared_parts))
    return result


def _emit_form(context: Context, op: ExpertsOp, plan: ExpertsPlan) -> ir.Value:
    if plan.form is not None:
        return emit_fused(context, op, plan.form, plan.shared, plan.shared_parts)
    if plan.packed is not None:
        return emit_packed_fused(context, op, plan.packed)
    if plan.choice.lowering is Lowering.LEAN_FUNCTION:
        return emit_lean_function(context, op)
    return emit_lean(context, op)


def emit_with_shared(context: Context, total: Operation) -> tuple[ir.Value, ...]:
    """The addition of routed and shared experts that one fused node computes."""
    y = _emit_layer(context, context.plans[total].op)
    rows = tensor_of(context.plans[total].op.y).shape
    shape = tensor_of(total.results[0]).shape
    if rows == shape:
        return (y,)
    return (context.builder.reshape(y, [context.size(size) for size in reshape_target(rows, shape)]),)
