"""Emission of the quant dialect: a packed weight that nothing takes packed, in float32."""

from __future__ import annotations

import onnx_ir as ir

from moec.codegen.onnx.context import Context
from moec.codegen.onnx.packed.decode import decode
from moec.codegen.onnx.packed.matrix import packed_matrix
from moec.codegen.onnx.packed.product import decoded, named_packed
from moec.codegen.onnx.registry import emits_op
from moec.dialects.quant import DequantOp


@emits_op(DequantOp)
def emit_dequant(context: Context, op: DequantOp) -> ir.Value:
    """The matrix, decoded when the model runs."""
    named = named_packed(context, op.weight)
    if named is not None:
        return decoded(context, named)
    return decode(context.builder, packed_matrix(op).map(lambda _, value: context.value(value)))
