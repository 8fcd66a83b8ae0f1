"""Emission of the moe dialect: routes in ai.onnx, experts in the form that the cost model chose."""

from __future__ import annotations

import onnx_ir as ir

from moec.codegen.onnx.context import Context
from moec.codegen.onnx.experts_lean import emit_lean
from moec.codegen.onnx.registry import emits_op
from moec.codegen.onnx.route import RouteOperands, emit_route
from moec.dialects.moe import ExpertsOp, RouteOp


@emits_op(RouteOp)
def emit_route_op(context: Context, op: RouteOp) -> tuple[ir.Value, ...]:
    """`moe.route`: ids, gates and, where something reads it, count."""
    logits = context.value(op.logits)
    operands = RouteOperands(
        logits,
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


@emits_op(ExpertsOp)
def emit_experts(context: Context, op: ExpertsOp) -> ir.Value:
    """`moe.experts`."""
    return emit_lean(context, op)
