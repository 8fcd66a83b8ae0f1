"""Which experts `com.microsoft::MoE` can compute: two products with an activation between that the operator has.

The products are found by structure. What lies between them is found by what it computes: the body is run in float64 on
random numbers, far enough out that every clamp acts, and compared with each form that the operator has. So any spelling
of an activation is recognised, and none is mistaken for another.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch

from moec.codegen.onnx.context import Context, constant_array, tensor_of
from moec.codegen.onnx.expert_products import BodyProducts, Product, Stacks, find_products
from moec.codegen.onnx.experts_lean import class_stacks
from moec.dialects.builtin import ConstantOp
from moec.dialects.moe import ExpertsOp
from moec.errors import MoecError
from moec.ir.operation import Block, Operation, Value
from moec.reference import aten_kernel, nn_kernels
from moec.reference.element_types import ElementTypes
from moec.reference.frame import ExpertsLowering, Frame, RunSettings
from moec.reference.kernels import prepare
from moec.reference.weight_loader import WeightLoader
from moec.weights.expression import Concat, Expression, Permute, Reshape

# imported for the kernels that they register
_KERNEL_MODULES = (aten_kernel, nn_kernels)

# where aten operations keep the numbers that an activation may have as parameters
_NUMBER_ARGUMENTS = ("other", "alpha", "beta", "min", "max", "value")
_PROBE_ROWS = 64
_TOLERANCE = 1e-12


class Activation(Enum):
    """`activation_type` of the operator, as its CPU kernel computes it."""

    SWIGLU = "swiglu"
    SILU = "silu"
    RELU = "relu"
    GELU = "gelu"  # the tanh form
    IDENTITY = "identity"


class GateLayout(Enum):
    """How gate and up rows lie in the first weight."""

    GATE_FIRST = "gate_first"
    UP_FIRST = "up_first"
    GATE_EVEN = "gate_even"
    UP_EVEN = "up_even"


@dataclass(frozen=True)
class FusedForm:
    """Experts as the operator takes them.

    `first` [experts, F, H] and `second` [experts, H, I] are weight expressions; F = 2 I, interleaved, for swiglu (even
    rows are the gate's), else I; biases [experts, F] and [experts, H]. swiglu is g * sigmoid(alpha * g) *
    (u + beta), with g <= limit and |u| <= limit.
    """

    activation: Activation
    first: Expression
    first_bias: Expression | None
    second: Expression
    second_bias: Expression | None
    hidden: int
    width: int
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None


class NotFused(Exception):
    """Why experts cannot go to the operator. It is an answer, caught where a lowering is chosen, not an error."""


def fused_form(context: Context, op: ExpertsOp) -> FusedForm:
    """The experts of `op` for the operator; raises NotFused with the reason."""
    if len(op.classes) != 1:
        raise NotFused(f"the layer has {len(op.classes)} classes of experts, the operator takes one")
    group, _, region = next(op.class_operands())
    if group.shared:
        raise NotFused("the experts share weights")
    try:
        stacks = class_stacks(context, op, 0)
    except MoecError as error:
        raise NotFused(error.message) from error
    return form_of_body(context, region.block, stacks, op.expert_count)


def form_of_body(context: Context, block: Block, stacks: Sequence[Stacks], experts: int) -> FusedForm:
    """Experts with the body `block` and the weights `stacks`; raises NotFused with the reason."""
    layers = two_layers(context, block, stacks)
    first, second, activation = layers.first, layers.second, layers.activation
    if any(product.weight.packed is not None for product in (*first, second)):
        raise NotFused("the weights of its experts are packed")
    width = second.weight.shape[1]
    first_weight, first_bias = _joined(first)
    if activation.layout is not None:
        shape = (experts, 2 * width, first[0].weight.shape[1])
        first_weight = interleaved(first_weight, activation.layout, shape)
        if first_bias is not None:
            first_bias = interleaved(first_bias, activation.layout, shape[:2])
    return FusedForm(
        activation.kind,
        first_weight,
        first_bias,
        second.weight.expression,
        None if second.bias is None else second.bias.expression,
        hidden=second.weight.shape[0],
        width=width,
        alpha=activation.alpha,
        beta=activation.beta,
        limit=activation.limit,
    )


@dataclass(frozen=True)
class TwoLayers:
    """An expert as one or two products of the rows (gate and up), an activation, and the product of its result."""

    first: tuple[Product, ...]
    second: Product
    activation: Recognised


def two_layers(context: Context, block: Block, stacks: Sequence[Stacks]) -> TwoLayers:
    """What experts with the body `block` and the weights `stacks` are; raises NotFused where they are not that."""
    try:
        found = find_products(block, stacks)
    except MoecError as error:
        raise NotFused(error.message) from error
    first, second = _products_of(block, found)
    return TwoLayers(tuple(first), second, _activation(context, block, first, second))


def _products_of(block: Block, found: BodyProducts) -> tuple[list[Product], Product]:
    """The products of the rows, and the one that gives the result."""
    result = block.terminator.operands[0]
    second = next((product for product in found.products if product.result is result), None)
    first = [product for product in found.products if product.rows is block.arguments[0]]
    if second is None or not first or len(first) > 2 or len(found.products) != len(first) + 1:
        raise NotFused("an expert is not two products with an activation between them")
    if len({product.bias is None for product in first}) > 1:
        raise NotFused("one of the gate and up products has a bias, the other has none")
    return first, second


def _joined(products: Sequence[Product]) -> tuple[Expression, Expression | None]:
    """Weights of one or two products one below the other, and so their biases."""
    if len(products) == 1:
        bias = products[0].bias
        return products[0].weight.expression, None if bias is None else bias.expression
    weight = Concat(1, tuple(product.weight.expression for product in products))
    biases = [product.bias.expression for product in products if product.bias is not None]
    return weight, Concat(1, tuple(biases)) if biases else None


def interleaved(expression: Expression, layout: GateLayout, shape: tuple[int, ...]) -> Expression:
    """Rows [experts, F, ...] in the operator's order: gate 0, up 0, gate 1, up 1, ..."""
    experts, rows, *tail = shape
    match layout:
        case GateLayout.GATE_EVEN:
            return expression
        case GateLayout.GATE_FIRST:
            halves = Reshape(expression, (experts, 2, rows // 2, *tail))
            rest = range(3, 3 + len(tail))
            return Reshape(Permute(halves, (0, 2, 1, *rest)), shape)
    raise NotFused(f"gate and up rows lie as {layout.value}, which no known model has")


@dataclass(frozen=True)
class Recognised:
    """An activation of the operator, and where gate and up lie in the results of the first products."""

    kind: Activation
    layout: GateLayout | None = None
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None

    def compute(self, z: torch.Tensor) -> torch.Tensor:
        """What the operator computes between its products, for z [n, F]."""
        match self.kind:
            case Activation.SILU:
                return torch.nn.functional.silu(z)
            case Activation.RELU:
                return torch.relu(z)
            case Activation.GELU:
                return torch.nn.functional.gelu(z, approximate="tanh")
            case Activation.IDENTITY:
                return z
        gate, up = self._parts(z)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)

    def _parts(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = z.shape[1] // 2
        match self.layout:
            case GateLayout.GATE_FIRST:
                return z[:, :half], z[:, half:]
            case GateLayout.UP_FIRST:
                return z[:, half:], z[:, :half]
            case GateLayout.GATE_EVEN:
                return z[:, 0::2], z[:, 1::2]
        return z[:, 1::2], z[:, 0::2]


def _activation(context: Context, block: Block, first: Sequence[Product], second: Product) -> Recognised:
    """The operator's activation that computes what lies between the products."""
    widths = [product.weight.shape[0] for product in first]
    generator = torch.Generator().manual_seed(0)
    # magnitudes from 1e-3 to some 50, of both signs
    scale = torch.logspace(-3, 1.2, _PROBE_ROWS, dtype=torch.float64)[:, None]
    z = torch.randn((_PROBE_ROWS, sum(widths)), generator=generator, dtype=torch.float64) * scale
    values: dict[Value, torch.Tensor] = {}
    start = 0
    for product, rows in zip(first, widths, strict=True):
        values[product.result] = z[:, start : start + rows]
        start += rows
    expected = _run_between(context, block, values, second)
    if expected is None or expected.shape != (_PROBE_ROWS, second.weight.shape[1]):
        raise NotFused("what lies between the two products reads more than the first one")
    for candidate in _candidates(block, gated=sum(widths) == 2 * second.weight.shape[1]):
        difference = (candidate.compute(z) - expected).abs()
        if bool((difference <= _TOLERANCE * (1 + expected.abs())).all()):
            return candidate
    raise NotFused("com.microsoft::MoE has no such activation")


def _candidates(block: Block, *, gated: bool) -> Iterator[Recognised]:
    if not gated:
        yield from (Recognised(kind) for kind in Activation if kind is not Activation.SWIGLU)
        return
    numbers = sorted({abs(number) for number in _numbers(block)})
    for layout in (GateLayout.GATE_FIRST, GateLayout.GATE_EVEN, GateLayout.UP_FIRST, GateLayout.UP_EVEN):
        limits: list[float | None] = [None, *numbers]
        for alpha, beta, limit in itertools.product([1.0, *numbers], [0.0, *numbers], limits):
            yield Recognised(Activation.SWIGLU, layout, alpha, beta, limit)


def _numbers(block: Block) -> Iterator[float]:
    """Numbers that the body names: the operator's parameters are among them."""
    for op in block:
        if isinstance(op, ConstantOp):
            array = constant_array(op)
            if array.size == 1 and array.dtype.kind == "f":
                yield float(array.reshape(-1)[0])
        for name in _NUMBER_ARGUMENTS:
            value = op.attributes.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
                yield float(value)


def _run_between(
    context: Context, block: Block, values: dict[Value, torch.Tensor], second: Product
) -> torch.Tensor | None:
    """The rows of the second product in float64, given the results of the first ones; None where they need more."""
    types = ElementTypes(torch.float64)
    settings = RunSettings(types, WeightLoader(context.weights, types), ExpertsLowering.GROUPED)
    frame = Frame(settings, {"tokens": _PROBE_ROWS}, dict(values))
    for op in block:
        if op is block.last or op.results[0] in frame.values:
            continue
        if all(value in frame.values for value in op.operands) and _is_between(op):
            frame.values.update(zip(op.results, prepare(op)(frame), strict=True))
    return frame.values.get(second.rows)


def _is_between(op: Operation) -> bool:
    return all(tensor_of(result).dtype.is_float or not op.operands for result in op.results)
