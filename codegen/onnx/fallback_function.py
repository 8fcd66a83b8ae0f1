"""The model-local function that computes `com.microsoft::MoE` in ai.onnx.

It has the operator's own domain and name. ONNX Runtime prefers its kernel; other runtimes, the reference evaluator and
the inliner of onnx run this body. One body serves every layer: sizes are read at run time, and only experts that some
token chose are computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moec.codegen.onnx.expert_form import Activation
from moec.codegen.onnx.graph import MICROSOFT, GraphBuilder
from moec.ir.types import DType

OPERATOR = "MoE"
_FLOATS = ("activation_alpha", "activation_beta", "swiglu_limit")


@dataclass(frozen=True)
class FallbackForm:
    """What the body depends on beyond sizes and numbers; a file can hold one form, since a function has one body."""

    activation: Activation
    has_bias: bool
    has_limit: bool


def fallback_function(opset: int, form: FallbackForm) -> ir.Function:
    """The function for nodes of one form, normalised routing weights."""
    b = GraphBuilder(opset, constants_as_nodes=True)
    x, logits, first, first_bias, second = (
        b.input(name, None, None)
        for name in ("input", "router_probs", "fc1_experts_weights", "fc1_experts_bias", "fc2_experts_weights")
    )
    second_bias = b.input("fc2_experts_bias", None, None) if form.has_bias else None
    k = b.op("Reshape", b.op("Constant", value_int=_reference("k", ir.AttributeType.INT, "value_int")), b.ints(1))
    values, ids = b.ops("TopK", b.op("Softmax", logits, axis=-1), k, outputs=2, axis=-1)
    gates = b.op("Div", values, b.op("ReduceSum", values, b.ints(-1), keepdims=1))
    used = b.op("Unique", ids)
    zero, one_axis = b.integer(0), b.ints(1)
    parameters = {name: _number_attribute(b, name) for name in _numbers_read(form)}
    body = b.subgraph()
    step = body.input("step", DType.I64, ())
    running = body.input("running", DType.I1, ())
    total = body.input("total", None, None)
    expert = body.op("Gather", used, step, axis=0)
    hits = body.op("NonZero", body.op("Equal", ids, expert))
    token = body.op("Gather", hits, zero, axis=0)
    gate = body.op("GatherND", gates, body.op("Transpose", hits, perm=[1, 0]))
    rows = body.op("Gather", x, token, axis=0)
    bias = body.op("Gather", first_bias, expert, axis=0) if form.has_bias else None
    hidden = body.op("Gemm", rows, body.op("Gather", first, expert, axis=0), bias, transB=1)
    hidden = _activated(body, hidden, form, parameters)
    bias = None if second_bias is None else body.op("Gather", second_bias, expert, axis=0)
    output = body.op("Gemm", hidden, body.op("Gather", second, expert, axis=0), bias, transB=1)
    weighted = body.op("Mul", output, body.op("Unsqueeze", gate, one_axis))
    added = body.op("ScatterND", total, body.op("Unsqueeze", token, one_axis), weighted, reduction="add")
    body.output(body.op("Identity", running), "still_running", DType.I1, ())
    body.output(added, "new_total", None, None)
    count = b.op("Squeeze", b.op("Shape", used), b.ints(0))
    always = b.constant(np.array(True))
    nothing = b.op("Sub", x, x)
    result = b.op("Loop", count, always, nothing, body=body.to_graph("experts"))
    b.output(result, "output", None, None)
    # exactly those that the nodes have: an evaluator may refuse to call a function without one of its attributes
    attributes = [
        ir.Attr("k", ir.AttributeType.INT, None),
        ir.Attr("normalize_routing_weights", ir.AttributeType.INT, None),
        ir.Attr("activation_type", ir.AttributeType.STRING, None),
    ]
    if form.activation is Activation.SWIGLU:
        attributes.append(ir.Attr("swiglu_fusion", ir.AttributeType.INT, None))
    attributes += [ir.Attr(name, ir.AttributeType.FLOAT, None) for name in _numbers_read(form)]
    return ir.Function(MICROSOFT, OPERATOR, graph=b.to_graph(OPERATOR), attributes=attributes)


def _activated(b: GraphBuilder, hidden: ir.Value, form: FallbackForm, parameters: dict[str, ir.Value]) -> ir.Value:
    match form.activation:
        case Activation.IDENTITY:
            return hidden
        case Activation.RELU:
            return b.op("Relu", hidden)
        case Activation.GELU:
            return b.op("Gelu", hidden, approximate="tanh")
        case Activation.SILU:
            return b.op("Mul", hidden, b.op("Sigmoid", hidden))
    pairs = b.op("Reshape", hidden, b.op("Concat", b.op("Shape", hidden, start=0, end=1), b.ints(-1, 2), axis=0))
    gate = b.op("Gather", pairs, b.integer(0), axis=2)
    up = b.op("Gather", pairs, b.integer(1), axis=2)
    if form.has_limit:
        limit = parameters["swiglu_limit"]
        gate = b.op("Min", gate, limit)
        up = b.op("Max", b.op("Min", up, limit), b.op("Neg", limit))
    sharp = b.op("Sigmoid", b.op("Mul", gate, parameters["activation_alpha"]))
    return b.op("Mul", b.op("Mul", gate, sharp), b.op("Add", up, parameters["activation_beta"]))


def _numbers_read(form: FallbackForm) -> tuple[str, ...]:
    if form.activation is not Activation.SWIGLU:
        return ()
    return _FLOATS if form.has_limit else _FLOATS[:2]


def _number_attribute(b: GraphBuilder, name: str) -> ir.Value:
    return b.op("Constant", value_float=_reference(name, ir.AttributeType.FLOAT, "value_float"))


def _reference(name: str, kind: ir.AttributeType, attribute: str) -> ir.Attr:
    """An attribute of a node in the body that takes the value of the function's attribute `name`."""
    return ir.RefAttr(attribute, name, kind)
