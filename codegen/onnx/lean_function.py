"""The lean form inside a model-local function: one node in the main graph, whatever the number of experts.

ONNX Runtime inlines the function when it loads the file, so the speed is that of the lean form. Layers of equal
structure share one function.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from moec.codegen.onnx.context import Context
from moec.codegen.onnx.experts_lean import emit_lean
from moec.codegen.onnx.external_data import StoredTensor
from moec.codegen.onnx.functions import DOMAIN, define_function
from moec.codegen.onnx.graph import GraphBuilder
from moec.dialects.moe import ExpertsOp


class _BodyBuilder(GraphBuilder):
    """Builds a function body; its weights are arguments, in the order of first use."""

    def __init__(self, opset: int) -> None:
        super().__init__(opset, constants_as_nodes=True)
        self.arguments: dict[str, tuple[ir.Value, StoredTensor]] = {}

    def weight(self, key: str, tensor: StoredTensor) -> ir.Value:
        if key not in self.arguments:
            mine = replace(tensor, expert=self._shared.expert)
            self.arguments[key] = (self.input(f"weight_{len(self.arguments)}", None, None), mine)
        return self.arguments[key][0]


def emit_lean_function(context: Context, op: ExpertsOp) -> ir.Value:
    """The sum over slots of gate times expert, [T, H], as a call of a function in the domain `moec`."""
    b = context.builder
    body = _BodyBuilder(b.opset)
    inner = replace(context, builder=body, values={}, sizes={})
    inputs = [op.x, op.ids, op.gates]
    for value, name in zip(inputs, ("x", "ids", "gates"), strict=True):
        inner.values[value] = body.input(name, None, None)
    body.output(emit_lean(inner, op), "y", None, None)
    name = define_function(context, "experts", body)
    weights = [b.weight(key, tensor) for key, (_, tensor) in body.arguments.items()]
    return b.op(name, *[context.value(value) for value in inputs], *weights, domain=DOMAIN)
