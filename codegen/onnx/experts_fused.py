"""`moe.experts` as one node: `com.microsoft::MoE`, with the routing log-encoded.

The operator routes by itself: softmax, top-k, renormalise. To make it use gates that were computed outside, it is given
their logarithms: softmax(log g) = g / sum(g), and the sum is multiplied back. So every router with gates >= 0 works,
whatever its arithmetic, and slots with gate 0 are skipped. What the operator would get silently wrong (sparsemixer,
another GELU, negative gates, shapes of gate and up) never reaches it: `fused_form` and `check_gates` refuse it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from moec.codegen.onnx.context import Context, tensor_of
from moec.codegen.onnx.expert_form import Activation, FusedForm, NotFused
from moec.codegen.onnx.expert_rows import expert_positions, static_size
from moec.codegen.onnx.fallback_function import OPERATOR, FallbackForm
from moec.codegen.onnx.graph import MICROSOFT
from moec.codegen.onnx.shared_experts import SharedExpert
from moec.dialects.moe import ExpertsOp, RouteOp, Score, WeightFrom
from moec.weights.expression import Expression

# What the operator gets for an expert with gate 0: its weight becomes exactly zero.
ABSENT = -1e30


def fallback_form(form: FusedForm) -> FallbackForm:
    """Which fallback body the node needs."""
    return FallbackForm(form.activation, form.first_bias is not None, form.limit is not None)


def check_gates(context: Context, op: ExpertsOp) -> None:
    """Raises NotFused unless the gates of `op` are known not to be negative, which a logarithm requires."""
    route = op.gates.defining_op
    if not isinstance(route, RouteOp):
        raise NotFused("the gates do not come from moe.route, so they may be negative")
    routing = route.routing
    if routing.weight_from is WeightFrom.SCORE and routing.score is Score.IDENTITY:
        raise NotFused("gates that are raw logits may be negative")
    if routing.scale < 0 or routing.offset < 0 or route.score_override is not None:
        raise NotFused("the gates may be negative")
    if route.per_expert_scale is not None:
        named = context.named_weight(route.per_expert_scale)
        if named is None or bool((context.weights.load(named.expression) < 0).any()):
            raise NotFused("the scale of an expert may be negative")


def emit_fused(
    context: Context, op: ExpertsOp, form: FusedForm, shared: SharedExpert | None, shared_parts: int
) -> ir.Value:
    """The sum over slots of gate times expert, [T, H], with the shared expert's output if there is one."""
    b = context.builder
    gates = dense_gates(context, op)
    if shared is not None:
        gates = b.op("Concat", gates, _shared_gates(context, gates, shared, shared_parts), axis=1)
    present = b.op("Greater", gates, b.number(0.0))
    logits = b.op("Where", present, b.op("Log", gates), b.number(ABSENT))
    y = b.op(
        OPERATOR,
        context.value(op.x),
        logits,
        _stack(context, op, form.first, "up"),
        _stack(context, op, form.first_bias, "up_bias", vectors=True),
        _stack(context, op, form.second, "down"),
        _stack(context, op, form.second_bias, "down_bias", vectors=True),
        domain=MICROSOFT,
        **operator_attributes(form, slots_used(op) + shared_parts),
    )
    return b.op("Mul", y, b.op("ReduceSum", gates, b.ints(-1), keepdims=1))


def _shared_gates(context: Context, gates: ir.Value, shared: SharedExpert, parts: int) -> ir.Value:
    """The routing weight of each part of the shared expert, [T, parts]."""
    b = context.builder
    weight = b.number(1.0) if shared.gate is None else b.reshape(context.value(shared.gate), (-1, 1))
    return b.op("Expand", weight, b.op("Concat", b.size(gates, 0), b.ints(parts), axis=0))


def operator_attributes(form: FusedForm, top_k: int) -> dict[str, int | float | str]:
    """The attributes of the node. All that the fallback reads are given, the operator's defaults too."""
    attributes: dict[str, int | float | str] = {
        "k": top_k,
        "activation_type": form.activation.value,
        "normalize_routing_weights": 1,
    }
    if form.activation is Activation.SWIGLU:
        attributes["swiglu_fusion"] = 1
        attributes["activation_alpha"] = form.alpha
        attributes["activation_beta"] = form.beta
        if form.limit is not None:
            attributes["swiglu_limit"] = form.limit
    return attributes


def dense_gates(context: Context, op: ExpertsOp) -> ir.Value:
    """Gates [T, experts]: zero where an expert was not chosen; those of aliases of one expert add."""
    b = context.builder
    ids, gates = context.value(op.ids), context.value(op.gates)
    table = expert_positions(op)
    columns = op.expert_count + int(op.expert_count in table)
    if not np.array_equal(table, np.arange(len(table))):
        ids = b.op("Gather", b.constant(table), ids, axis=0)
    zeros = b.op("Expand", b.number(0.0), b.op("Concat", b.size(ids, 0), b.ints(columns), axis=0))
    # "add" also where no id repeats within a token: empty slots all have id 0
    dense = b.op("ScatterElements", zeros, ids, gates, axis=1, reduction="add")
    if columns > op.expert_count:
        dense = b.op("Slice", dense, b.ints(0), b.ints(op.expert_count), b.ints(1))
    return dense


def slots_used(op: ExpertsOp) -> int:
    """How many experts the operator has to look at for a token."""
    return min(static_size(op, tensor_of(op.ids).shape[1]), op.expert_count)


def _stack(
    context: Context, op: ExpertsOp, expression: Expression | None, role: str, *, vectors: bool = False
) -> ir.Value | None:
    if expression is None:
        return None
    named = context.named_weight(op.weights[0])
    prefix = "experts" if named is None else named.name.rpartition(".")[0]
    return context.weight(expression, f"{prefix}.fused_{role}", vectors=vectors)
