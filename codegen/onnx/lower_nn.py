"""Emission of the nn dialect: norms, rotary embedding, attention with its masks and cache, dense blocks."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from moec.codegen.onnx.context import Context, tensor_of
from moec.codegen.onnx.registry import emit_block, emits_op
from moec.codegen.onnx.sparse_mlp import emit_sparse, find_sparse
from moec.dialects.aten import AtenOp
from moec.dialects.nn import AttentionMaskOp, AttentionOp, LayerNormOp, MLPOp, RMSNormOp, RotaryOp
from moec.ir.dimensions import DimExpr
from moec.ir.operation import Value
from moec.ir.types import DType

# What masked logits get: finite, so that a row without any key gives numbers; its probability is zero all the same.
MASKED = float(np.finfo(np.float32).min)
_ELEMENTWISE = (
    "aten.cos.default",
    "aten.sin.default",
    "aten.mul.Scalar",
    "aten._to_copy.default",
    "aten.clone.default",
)


@emits_op(RMSNormOp)
def emit_rms_norm(context: Context, op: RMSNormOp) -> ir.Value:
    """`nn.rms_norm`; RMSNormalization where the opset has it."""
    b, x = context.builder, context.value(op.x)
    kind = tensor_of(op.x)
    weight = context.optional(op.weight)
    if weight is not None and op.offset:
        weight = b.op("Add", weight, context.scalar(op.offset, kind.dtype))
    if op.zero_sum:
        squares = b.op("ReduceSumSquare", x, b.ints(-1), keepdims=1)
        total = b.op("ReduceSum", x, b.ints(-1), keepdims=1)
        whole = b.op("Add", squares, b.op("Mul", total, total))
        mean = b.op("Div", whole, context.scalar(_static(kind.shape[-1]) + 1.0, kind.dtype))
        normed = b.op("Div", x, b.op("Sqrt", b.op("Add", mean, context.scalar(op.epsilon, kind.dtype))))
        return normed if weight is None else b.op("Mul", normed, weight)
    if b.opset >= 23 and weight is not None:
        return b.op("RMSNormalization", x, weight, axis=-1, epsilon=op.epsilon)
    # ONNX Runtime recognises this form and replaces it by one kernel
    mean = b.op("ReduceMean", b.op("Pow", x, b.number(2.0)), b.ints(-1), keepdims=1)
    deviation = b.op("Sqrt", b.op("Add", mean, context.scalar(op.epsilon, kind.dtype)))
    normed = b.op("Div", x, deviation)
    return normed if weight is None else b.op("Mul", normed, weight)


@emits_op(LayerNormOp)
def emit_layer_norm(context: Context, op: LayerNormOp) -> ir.Value:
    """`nn.layer_norm`."""
    b, kind = context.builder, tensor_of(op.x)
    weight = context.optional(op.weight)
    if weight is None:
        weight = b.op("Expand", context.scalar(1.0, kind.dtype), context.shape(kind.shape[-1:]))
    bias = context.optional(op.bias)
    return b.op("LayerNormalization", context.value(op.x), weight, bias, axis=-1, epsilon=op.epsilon)


@emits_op(RotaryOp)
def emit_rotary(context: Context, op: RotaryOp) -> ir.Value:
    """`nn.rotary`; RotaryEmbedding, which takes half of cos and sin, where the halves are known to be equal."""
    b, x = context.builder, context.value(op.x)
    width, rotated = _static(tensor_of(op.x).shape[3]), _static(tensor_of(op.cos).shape[2])
    whole_batch = tensor_of(op.cos).shape[0] == tensor_of(op.x).shape[0]
    if b.opset >= 23 and not op.interleaved and whole_batch and _halves_equal(op.cos) and _halves_equal(op.sin):
        end, last = b.ints(rotated // 2), b.ints(2)
        halves = [b.op("Slice", context.value(value), b.ints(0), end, last) for value in (op.cos, op.sin)]
        partial = rotated if rotated < width else None
        return b.op("RotaryEmbedding", x, *halves, rotary_embedding_dim=partial)
    cos, sin = (b.op("Unsqueeze", context.value(value), b.ints(1)) for value in (op.cos, op.sin))
    rest = None
    if rotated < width:
        x, rest = b.ops("Split", x, b.ints(rotated, width - rotated), outputs=2, axis=-1)
    half = rotated // 2
    if op.interleaved:
        # pairs (2i, 2i + 1) become (-x[2i + 1], x[2i])
        order = np.arange(rotated) ^ 1
        signs = np.where(np.arange(rotated) % 2 == 0, -1, 1).astype(np.float32)
        turned = b.op("Mul", b.op("Gather", x, b.constant(order), axis=-1), b.constant(signs))
    else:
        first, second = b.ops("Split", x, b.ints(half, half), outputs=2, axis=-1)
        turned = b.op("Concat", b.op("Neg", second), first, axis=-1)
    y = b.op("Add", b.op("Mul", x, cos), b.op("Mul", turned, sin))
    return y if rest is None else b.op("Concat", y, rest, axis=-1)


def _halves_equal(value: Value) -> bool:
    """Whether the last axis holds the same numbers twice: element-wise functions of a tensor joined with itself."""
    op = value.defining_op
    while isinstance(op, AtenOp) and op.name in _ELEMENTWISE and op.operand_count == 1:
        op = op.operands[0].defining_op
    if not isinstance(op, AtenOp) or op.name != "aten.cat.default" or op.operand_count != 2:
        return False
    last = tensor_of(op.results[0]).rank - 1
    return op.operands[0] is op.operands[1] and op.argument("dim") in (-1, last)


@emits_op(AttentionMaskOp)
def emit_attention_mask(context: Context, op: AttentionMaskOp) -> ir.Value:
    """`nn.attention_mask` as a boolean [batch, 1, S, T]."""
    b = context.builder
    shape = tensor_of(op.mask).shape
    queries, keys = shape[2], shape[3]
    zero, one = b.integer(0), b.integer(1)
    key_slots = b.op("Range", zero, context.scalar(keys, DType.I64), one)
    query_slots = b.op("Range", context.scalar(keys - queries, DType.I64), context.scalar(keys, DType.I64), one)
    query_slots = b.op("Unsqueeze", query_slots, b.ints(1))
    # [batch, 1, 1, T]
    padding = context.value(op.padding)
    visible = b.op("Unsqueeze", b.cast(padding, DType.I1), b.ints(1, 2))
    if op.causal:
        visible = b.op("And", visible, b.op("LessOrEqual", key_slots, query_slots))
    if op.window:
        distance = b.op("Sub", query_slots, key_slots)
        if not op.causal:
            distance = b.op("Abs", distance)
        visible = b.op("And", visible, b.op("Less", distance, b.integer(op.window)))
    if op.chunk:
        # position = slot - first slot that is no padding
        first = b.op("Unsqueeze", b.op("ArgMax", padding, axis=1, keepdims=1), b.ints(1, 2))
        size = b.integer(op.chunk)
        positions = (b.op("Sub", slots, first) for slots in (query_slots, key_slots))
        # rounded down also before the first token, where positions are negative
        blocks = [b.op("Sub", position, b.op("Mod", position, size)) for position in positions]
        visible = b.op("And", visible, b.op("Equal", *blocks))
    if not (op.causal or op.window or op.chunk):
        visible = b.op("Expand", visible, context.shape([1, 1, queries, 1]))
    return visible


@emits_op(AttentionOp)
def emit_attention(context: Context, op: AttentionOp) -> tuple[ir.Value, ...]:
    """`nn.attention`: keys and values are not repeated; the query heads of one key head become rows of one product."""
    b = context.builder
    query_type, key_type, value_type = (tensor_of(value) for value in (op.query, op.key, op.value))
    heads, key_heads = _static(query_type.shape[1]), _static(key_type.shape[1])
    key, value = context.value(op.key), context.value(op.value)
    present: tuple[ir.Value, ...] = ()
    if op.past_key is not None and op.past_value is not None:
        key = b.op("Concat", context.value(op.past_key), key, axis=2)
        value = b.op("Concat", context.value(op.past_value), value, axis=2)
        present = (key, value)
    query = context.value(op.query)
    if op.scale != 1.0:
        query = b.op("Mul", query, context.scalar(op.scale, query_type.dtype))
    group = heads // key_heads
    if group > 1:
        query = b.reshape(query, (0, key_heads, -1, _static(query_type.shape[3])))
    scores = b.op("MatMul", query, b.op("Transpose", key, perm=[0, 1, 3, 2]))
    if op.softcap:
        cap = context.scalar(op.softcap, query_type.dtype)
        scores = b.op("Mul", b.op("Tanh", b.op("Div", scores, cap)), cap)
    probabilities = _probabilities(context, op, scores, group)
    output = b.op("MatMul", probabilities, value)
    if group > 1:
        output = b.reshape(output, (0, heads, -1, _static(value_type.shape[3])))
    return b.op("Transpose", output, perm=[0, 2, 1, 3]), *present


def _probabilities(context: Context, op: AttentionOp, scores: ir.Value, group: int) -> ir.Value:
    """Softmax of scores [batch, Hk, group * S, T] with mask and sinks; the result has the same shape."""
    b = context.builder
    query_type = tensor_of(op.query)
    heads = _static(query_type.shape[1])
    keys = tensor_of(op.present[0] if op.present else op.key).shape[2]
    regroup = group > 1 and (op.mask is not None or op.sinks is not None)
    if regroup:
        scores = b.reshape(scores, (0, heads, -1, context.size(keys)))
    if op.mask is not None:
        mask = context.value(op.mask)
        if tensor_of(op.mask).dtype is DType.I1:
            mask = b.op("Where", mask, b.number(0.0), b.number(MASKED))
        scores = b.op("Add", scores, mask)
    if op.sinks is None:
        result = b.op("Softmax", scores, axis=-1)
    else:
        sinks = b.reshape(context.value(op.sinks), (1, heads, 1, 1))
        column = b.op("Expand", sinks, context.shape((query_type.shape[0], 1, query_type.shape[2], 1)))
        weights = b.op("Softmax", b.op("Concat", scores, column, axis=3), axis=-1)
        result = b.op("Slice", weights, b.ints(0), b.ints(-1), b.ints(3))
    return b.reshape(result, (0, heads // group, -1, context.size(keys))) if regroup else result


@emits_op(MLPOp)
def emit_mlp(context: Context, op: MLPOp) -> ir.Value:
    """`nn.mlp`: its body on the rows of x."""
    b, kind = context.builder, tensor_of(op.x)
    x = context.value(op.x)
    rows = x if kind.rank == 2 else b.reshape(x, (-1, _static(kind.shape[-1])))
    sparse = find_sparse(context, op)
    if sparse is not None:
        y = emit_sparse(context, op, sparse, rows)
    else:
        block = op.regions[0].block
        inner = context.nested({"tokens": lambda: b.size(rows, 0)})
        inner.values[block.arguments[0]] = rows
        inner.aliases.update(zip(block.arguments[1:], op.weights, strict=True))
        y = emit_block(inner, block)[0]
    if kind.rank == 2:
        return y
    return b.op("Reshape", y, b.op("Shape", x))


def _static(size: int | DimExpr) -> int:
    if not isinstance(size, int):
        raise ValueError(f"size {size} must be static")
    return size
