"""`moe.experts` of packed weights as one node: `com.microsoft::QMoE`.

The operator selects the experts with the largest gates and weighs them by the gates themselves (its input
`router_weights`), never by a softmax of its own. Its kernel reads integers of one width in blocks; what it would
silently compute otherwise is refused here: other formats, other activations, gates that may be negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from moec.artifact.options import Activations
from moec.codegen.onnx.context import Context
from moec.codegen.onnx.expert_form import Activation, FusedForm, GateLayout, NotFused, interleaved, two_layers
from moec.codegen.onnx.expert_products import Product, Stacks
from moec.codegen.onnx.experts_fused import dense_gates, operator_attributes, slots_used
from moec.codegen.onnx.experts_lean import class_stacks
from moec.codegen.onnx.graph import MICROSOFT
from moec.codegen.onnx.packed.kernel_form import accuracy_level
from moec.dialects.moe import ExpertsOp
from moec.dialects.quant import Integer, Span, ZeroPoint
from moec.ir.types import DType
from moec.weights.expression import Concat, Expression

OPERATOR = "QMoE"
OLDEST_RUNTIME = "1.31"
"""The first onnxruntime whose kernel is faster than products of each expert; older ones lack `accuracy_level`."""


@dataclass(frozen=True)
class PackedFusedForm:
    """Experts as the operator takes them.

    `form` has the stacks of codes [experts, 2 I, H * bits / 8] and [experts, H, I * bits / 8] as weights, `scales` and
    `zero_points` (None: the middle) those of gate and up, interleaved, and of down; integers in blocks of `block`.
    """

    form: FusedForm
    integer: Integer
    scales: tuple[Expression, Expression]
    zero_points: tuple[Expression, Expression] | None


def packed_form(context: Context, op: ExpertsOp) -> PackedFusedForm:
    """The experts of `op` for the operator; raises NotFused with the reason."""
    if len(op.classes) != 1:
        raise NotFused(f"the layer has {len(op.classes)} classes of experts, the operator takes one")
    group, _, region = next(op.class_operands())
    if group.shared:
        raise NotFused("the experts share weights")
    layers = two_layers(context, region.block, class_stacks(context, op, 0))
    activation = layers.activation
    if activation.kind is not Activation.SWIGLU or activation.layout is None:
        raise NotFused("com.microsoft::QMoE is used for SwiGLU experts alone")
    width, hidden = layers.second.weight.shape[1], layers.second.weight.shape[0]
    kind = _common_format([*layers.first, layers.second], context.options.activations)
    if width % kind.group or hidden % kind.group:
        raise NotFused(f"groups of {kind.group} do not divide {hidden} and {width}")
    experts, layout = op.expert_count, activation.layout

    def first(name: str) -> Expression:
        stacks = [_operand(product, name) for product in layers.first]
        return _joined([stack.expression for stack in stacks], experts, 2 * width, stacks[0].shape[1:], layout)

    def both(name: str) -> tuple[Expression, Expression]:
        return first(name), _operand(layers.second, name).expression

    biases = [product.bias.expression for product in layers.first if product.bias is not None]
    codes = both("codes")
    form = FusedForm(
        activation.kind,
        codes[0],
        _joined(biases, experts, 2 * width, (), layout) if biases else None,
        codes[1],
        None if layers.second.bias is None else layers.second.bias.expression,
        hidden,
        width,
        activation.alpha,
        activation.beta,
        activation.limit,
    )
    zeros = both("zero_points") if kind.zero_point is ZeroPoint.INTEGER else None
    return PackedFusedForm(form, kind, both("scales"), zeros)


def packed_attributes(form: PackedFusedForm, top_k: int, activations: Activations) -> dict[str, Any]:
    """The attributes of the node."""
    return {
        **operator_attributes(form.form, top_k),
        "normalize_routing_weights": 0,
        "expert_weight_bits": form.integer.bits,
        "block_size": form.integer.group,
        "accuracy_level": accuracy_level(activations),
    }


def emit_packed_fused(context: Context, op: ExpertsOp, packed: PackedFusedForm) -> ir.Value:
    """The sum over slots of gate times expert, [T, H]."""
    b, form = context.builder, packed.form
    gates = dense_gates(context, op)
    named = context.named_weight(op.weights[0])
    prefix = "experts" if named is None else named.name.rpartition(".")[0]

    def stack(expression: Expression | None, role: str) -> ir.Value | None:
        return None if expression is None else context.stored_as_is(expression, f"{prefix}.fused_{role}")

    zeros = packed.zero_points or (None, None)
    return b.op(
        OPERATOR,
        context.value(op.x),
        gates,
        stack(form.first, "up"),
        stack(packed.scales[0], "up_scales"),
        stack(form.first_bias, "up_bias"),
        stack(form.second, "down"),
        stack(packed.scales[1], "down_scales"),
        stack(form.second_bias, "down_bias"),
        None,
        None,
        None,
        stack(zeros[0], "up_zeros"),
        stack(zeros[1], "down_zeros"),
        None,
        gates,
        domain=MICROSOFT,
        **packed_attributes(packed, slots_used(op), context.options.activations),
    )


def _common_format(products: list[Product], activations: Activations) -> Integer:
    """The one format of all matrices; raises NotFused where there is none that the kernel reads exactly."""
    kinds = {None if product.weight.packed is None else product.weight.packed.format for product in products}
    kind = next(iter(kinds))
    if len(kinds) > 1 or not isinstance(kind, Integer):
        raise NotFused("its matrices are not integers of one format")
    numbers = {product.weight.packed.number_type for product in products if product.weight.packed is not None}
    if kind.span is not Span.GROUP or kind.group < 16 or kind.group & (kind.group - 1):
        raise NotFused("its scales are not those of blocks of 16, 32, 64 ... weights")
    if kind.zero_point is ZeroPoint.FLOAT or numbers != {DType.F32}:
        raise NotFused("its zero points or scales are of a type that the operator does not take")
    # with 8 and 2 bits the kernel rounds activations to int8 at every accuracy level
    exact = kind.bits == 4
    coarse = activations is Activations.INT8 and (kind.bits == 8 or (kind.bits == 2 and kind.group >= 32))
    if not exact and not coarse:
        raise NotFused(f"the operator has no kernel for {kind.bits} bits and {activations.value} activations")
    return kind


def _operand(product: Product, name: str) -> Stacks:
    assert product.weight.packed is not None
    return product.weight.packed[name]


def _joined(parts: list[Expression], experts: int, rows: int, tail: tuple[int, ...], layout: GateLayout) -> Expression:
    """Rows of gate and up [experts, rows, ...] in pairs."""
    whole = parts[0] if len(parts) == 1 else Concat(1, tuple(parts))
    return interleaved(whole, layout, (experts, rows, *tail))
