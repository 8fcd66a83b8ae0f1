"""Emission of the moe dialect: routes in ai.onnx, experts in the form that the cost model chose."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from moec.codegen.onnx.context import Context, tensor_of
from moec.codegen.onnx.cost_model import Choice, ExpertsShape, Lowering, choose, predict
from moec.codegen.onnx.expert_form import FusedForm, NotFused, fused_form
from moec.codegen.onnx.experts_fused import check_gates, emit_fused, fallback_form, operator_attributes, slots_used
from moec.codegen.onnx.experts_lean import emit_lean, static_size
from moec.codegen.onnx.lean_function import emit_lean_function
from moec.codegen.onnx.parity import NodeSignature, check_parity
from moec.codegen.onnx.registry import emits_op
from moec.codegen.onnx.route import RouteOperands, emit_route
from moec.dialects.moe import ExpertsOp, RouteOp


@dataclass(frozen=True)
class LayerLowering:
    """How one `moe.experts` was emitted: `nodes` of the main graph, `parity` the gate's difference (None: no gate)."""

    layer: str
    choice: Choice
    experts: int
    nodes: int
    parity: float | None


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


@emits_op(ExpertsOp)
def emit_experts(context: Context, op: ExpertsOp) -> ir.Value:
    """`moe.experts`, in the form that fits sizes, tokens and target."""
    form, refusal, parity = _fused_or_refusal(context, op)
    choice = _choice(context, op, refusal)
    before = len(context.builder.nodes)
    if choice.lowering is Lowering.FUSED and form is not None:
        context.fallbacks.append(fallback_form(form))
        result = emit_fused(context, op, form)
    elif choice.lowering is Lowering.LEAN_FUNCTION:
        result = emit_lean_function(context, op)
    else:
        result = emit_lean(context, op)
    nodes = len(context.builder.nodes) - before
    layer = op.location.name or f"experts {len(context.lowerings)}"
    gate = parity if choice.lowering is Lowering.FUSED else None
    context.lowerings.append(LayerLowering(layer, choice, op.expert_count, nodes, gate))
    return result


def _choice(context: Context, op: ExpertsOp, refusal: str | None) -> Choice:
    options = context.options
    shape = experts_shape(op)
    forced = options.lowering
    if forced is not None and not (forced is Lowering.FUSED and refusal is not None):
        return Choice(forced, "asked for", {forced: predict(shape, options.tokens)[forced]})
    return choose(shape, options.tokens, options.target, refusal)


def experts_shape(op: ExpertsOp) -> ExpertsShape:
    """The sizes that the cost model reads."""
    elements = sum(math.prod(tensor_of(stack).static_shape) for stack in op.weights)
    slots = static_size(op, tensor_of(op.ids).shape[1])
    return ExpertsShape(op.expert_count, slots, elements / max(1, op.expert_count))


def _fused_or_refusal(context: Context, op: ExpertsOp) -> tuple[FusedForm | None, str | None, float | None]:
    """The layer for the fused operator, or why not, and the difference that the parity gate saw."""
    options = context.options
    if not options.target.profile.contrib:
        return None, "the target has no com.microsoft operators", None
    if options.weights_in_place:
        return None, "it needs its weights in another layout than the checkpoint's", None
    try:
        form = fused_form(context, op)
        check_gates(context, op)
    except NotFused as reason:
        return None, str(reason), None
    fallback = fallback_form(form)
    if context.fallbacks and fallback not in context.fallbacks:
        return None, "the file's fallback function has another activation", None
    attributes = tuple(operator_attributes(form, slots_used(op)).items())
    result = check_parity(NodeSignature(fallback, op.expert_count, attributes), options.target.profile)
    return form, result.problem, result.difference
