"""Decides, before anything is emitted, how each layer of experts is lowered."""

from __future__ import annotations

from dataclasses import dataclass

from moec.codegen.onnx.common_experts import find_common
from moec.codegen.onnx.context import Context
from moec.codegen.onnx.cost_model import ONE_NODE_EXPERTS, Choice, Lowering, choose, predict
from moec.codegen.onnx.expert_form import FusedForm, NotFused, fused_form
from moec.codegen.onnx.expert_rows import experts_shape
from moec.codegen.onnx.experts_fused import check_gates, fallback_form, operator_attributes, slots_used
from moec.codegen.onnx.experts_lean import decodes_any, has_packed_weights
from moec.codegen.onnx.experts_packed_fused import PackedFusedForm, packed_attributes, packed_form
from moec.codegen.onnx.lower_moe import emit_with_shared
from moec.codegen.onnx.packed_cost import choose_packed, decoding_seconds, predict_packed
from moec.codegen.onnx.packed_parity import check_packed_parity
from moec.codegen.onnx.parity import NodeSignature, check_parity
from moec.codegen.onnx.shared_experts import SharedExpert, find_shared, with_shared
from moec.dialects.builtin import FuncOp
from moec.dialects.moe import ExpertsOp

# A shared expert goes into the operator only for few tokens: with many, a product on packed weights is faster.
_SHARED_TOKENS = 8


@dataclass(frozen=True)
class ExpertsPlan:
    """How one `moe.experts` becomes ONNX.

    `form` is set for the fused operator; then `shared` is the shared expert that goes into it, if any, as
    `shared_parts` further experts. `packed` is set for the fused operator on packed weights. `parity` is the difference
    that the gate saw, None where there was no gate.
    """

    op: ExpertsOp
    choice: Choice
    form: FusedForm | None
    parity: float | None
    shared: SharedExpert | None = None
    shared_parts: int = 0
    packed: PackedFusedForm | None = None


def plan_layers(context: Context, function: FuncOp) -> None:
    """Fills the plans of `context`: of each layer, and of each addition that a fused node takes over."""
    layers = [op for op in function.body if isinstance(op, ExpertsOp)]
    context.common.update(find_common(context, layers))
    for op in layers:
        plan = _plan(context, op)
        context.plans[op] = plan
        if plan.shared is not None:
            context.plans[plan.shared.total] = plan
            context.taken_over[plan.shared.total] = emit_with_shared
            context.skipped.update(plan.shared.inside)


def _plan(context: Context, op: ExpertsOp) -> ExpertsPlan:
    if has_packed_weights(op):
        return _plan_packed(context, op)
    form, refusal, parity = _fused_or_refusal(context, op)
    choice = _choice(context, op, refusal)
    if choice.lowering is not Lowering.FUSED or form is None:
        return ExpertsPlan(op, choice, None, None)
    context.fallbacks.append(fallback_form(form))
    shared = find_shared(op) if context.options.tokens <= _SHARED_TOKENS else None
    if shared is None:
        return ExpertsPlan(op, choice, form, parity)
    try:
        joined, parts = with_shared(context, form, shared)
    except NotFused:
        return ExpertsPlan(op, choice, form, parity)
    found = _parity(context, op, joined, parts)
    if found[1] is not None:
        return ExpertsPlan(op, choice, form, parity)
    return ExpertsPlan(op, choice, joined, found[0], shared, parts)


def _plan_packed(context: Context, op: ExpertsOp) -> ExpertsPlan:
    options, shape = context.options, experts_shape(op)
    contrib = options.target.profile.contrib
    lean = Lowering.LEAN_FUNCTION if contrib and shape.experts >= ONE_NODE_EXPERTS else Lowering.LEAN
    if decodes_any(context, op):
        seconds = decoding_seconds(shape, options.tokens)
        what = (
            "some of its formats have no operator"
            if contrib
            else f"the form that the target {options.target.value} has"
        )
        return ExpertsPlan(op, Choice(lean, f"decoded expert by expert: {what}", {lean: seconds}), None, None)
    form, refusal, parity = _packed_or_refusal(context, op)
    choice = choose_packed(shape, options.tokens, options.activations, lean, refusal)
    forced = options.lowering
    if forced is not None and not (forced in (Lowering.FUSED, Lowering.FUSED_PACKED) and refusal is not None):
        taken = Lowering.FUSED_PACKED if forced is Lowering.FUSED else forced
        seconds = predict_packed(shape, options.tokens, options.activations)[taken]
        choice = Choice(taken, "asked for", {taken: seconds})
    if choice.lowering is not Lowering.FUSED_PACKED:
        return ExpertsPlan(op, choice, None, None)
    return ExpertsPlan(op, choice, None, parity, packed=form)


def _packed_or_refusal(context: Context, op: ExpertsOp) -> tuple[PackedFusedForm | None, str | None, float | None]:
    """The layer for the fused operator on packed weights, or why not, and what the parity gate saw."""
    if op in context.common:
        return None, "its experts occur again, and would be stored again", None
    if context.options.prepacked:
        # ONNX Runtime 1.31 loads what it saved for QMoE, and then computes something else or reads outside of it
        return None, "what its kernel arranges cannot be loaded again", None
    try:
        form = packed_form(context, op)
        check_gates(context, op)
    except NotFused as reason:
        return None, str(reason), None
    options = context.options
    attributes = tuple(packed_attributes(form, slots_used(op), options.activations).items())
    has_zeros, has_bias = form.zero_points is not None, form.form.first_bias is not None
    result = check_packed_parity(attributes, op.expert_count, has_zeros, has_bias, options.target.profile)
    return form, result.problem, result.difference


def _choice(context: Context, op: ExpertsOp, refusal: str | None) -> Choice:
    options = context.options
    shape = experts_shape(op)
    forced = Lowering.FUSED if options.lowering is Lowering.FUSED_PACKED else options.lowering
    if forced is not None and not (forced is Lowering.FUSED and refusal is not None):
        return Choice(forced, "asked for", {forced: predict(shape, options.tokens)[forced]})
    choice = choose(shape, options.tokens, options.target, refusal)
    if options.page_bytes and refusal is None and choice.lowering is not Lowering.FUSED:
        seconds = {Lowering.FUSED: predict(shape, options.tokens)[Lowering.FUSED]}
        return Choice(Lowering.FUSED, "its experts are read from their file when they are chosen", seconds)
    return choice


def _fused_or_refusal(context: Context, op: ExpertsOp) -> tuple[FusedForm | None, str | None, float | None]:
    """The layer for the fused operator, or why not, and the difference that the parity gate saw."""
    options = context.options
    if not options.target.profile.contrib:
        return None, "the target has no com.microsoft operators", None
    if options.weights_in_place:
        return None, "it needs its weights in another layout than the checkpoint's", None
    if op in context.common:
        return None, "its experts occur again, and would be stored again", None
    try:
        form = fused_form(context, op)
        check_gates(context, op)
    except NotFused as reason:
        return None, str(reason), None
    if context.fallbacks and fallback_form(form) not in context.fallbacks:
        return None, "the file's fallback function has another activation", None
    difference, problem = _parity(context, op, form, 0)
    return form, problem, difference


def _parity(context: Context, op: ExpertsOp, form: FusedForm, shared: int) -> tuple[float, str | None]:
    attributes = tuple(operator_attributes(form, slots_used(op) + shared).items())
    signature = NodeSignature(fallback_form(form), op.expert_count + shared, attributes)
    result = check_parity(signature, context.options.target.profile)
    return result.difference, result.problem
