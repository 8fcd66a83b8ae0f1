"""Model-local functions in the domain `moec`: what occurs many times in a model is written once."""

from __future__ import annotations

import hashlib

import onnx
import onnx_ir as ir

from moec.codegen.onnx.context import Context
from moec.codegen.onnx.graph import GraphBuilder

DOMAIN = "moec"


def define_function(context: Context, prefix: str, body: GraphBuilder) -> str:
    """The name of the function with this body, which the file now has; equal bodies are one function."""
    function = ir.Function(DOMAIN, "", graph=body.to_graph(prefix), attributes=[])
    proto: onnx.FunctionProto = ir.to_proto(function)
    function.name = f"{prefix}_{hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()[:12]}"
    context.functions.setdefault(function.name, function)
    return function.name
