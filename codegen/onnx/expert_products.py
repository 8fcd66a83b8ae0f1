"""The products in the body of an expert, and which of its values are weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moec.codegen.onnx.aten_shape import permutation
from moec.codegen.onnx.context import refuse, tensor_of
from moec.codegen.onnx.registry import normalized_axis
from moec.dialects.aten import AtenOp
from moec.dialects.builtin import ConstantOp
from moec.ir.operation import Block, Operation, Value
from moec.weights.expression import Expression, Permute, Slice, Transpose

_PRODUCTS = ("aten.linear.default", "aten.matmul.default", "aten.mm.default", "aten.addmm.default")
_VIEWS = ("aten.t.default", "aten.transpose.int", "aten.permute.default", "aten.numpy_T.default")
_SLICES = ("aten.slice.Tensor", "aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default")
_COPIES = ("aten.clone.default", "aten.alias.default", "aten.detach.default", "aten.contiguous.default")


@dataclass(frozen=True)
class Stacks:
    """One weight per expert: `expression` has a leading axis of experts, `shape` is that of one expert."""

    expression: Expression
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """rows @ weight^T + bias, where weight is [out, in] per expert."""

    op: AtenOp
    rows: Value
    weight: Stacks
    bias: Stacks | None


@dataclass(frozen=True)
class BodyProducts:
    """The products of rows and weights, in order; `stacks` holds every value of the body that is a weight."""

    products: list[Product]
    stacks: dict[Value, Stacks]


def find_products(block: Block, stacks: Sequence[Stacks]) -> BodyProducts:
    """Looks through the body for weights `stacks`, one per argument after the rows.

    Raises UnsupportedModelError where a weight is computed from weights by more than a view.
    """
    known: dict[Value, Stacks] = dict(zip(block.arguments[1:], stacks, strict=True))
    products: list[Product] = []
    for op in block:
        if op is block.last or isinstance(op, ConstantOp):
            continue
        if op.operands and all(value in known for value in op.operands):
            _derive(op, known)
        else:
            found = _product(op, known)
            if found is not None:
                products.append(found)
    return BodyProducts(products, known)


def _derive(op: Operation, stacks: dict[Value, Stacks]) -> None:
    """A view of a weight stays a weight."""
    source = stacks[op.operands[0]]
    if isinstance(op, AtenOp) and op.operand_count == 1:
        if op.name in _COPIES:
            stacks[op.results[0]] = source
            return
        if op.name in _VIEWS:
            stacks[op.results[0]] = _permuted(source, permutation(op))
            return
        if op.name in _SLICES:
            _cut(op, source, stacks)
            return
    raise refuse(op, "it computes a weight of an expert at run time")


def _cut(op: AtenOp, source: Stacks, stacks: dict[Value, Stacks]) -> None:
    axis = normalized_axis(op.argument("dim"), len(source.shape))
    step = op.argument("step") if op.name == "aten.slice.Tensor" else 1
    start = (op.argument("start") or 0) if op.name == "aten.slice.Tensor" else 0
    start += source.shape[axis] if start < 0 else 0
    for number, result in enumerate(op.results):
        shape = tensor_of(result).static_shape
        stop = min(start + shape[axis] * step, source.shape[axis])
        expression = Slice(source.expression, axis + 1, start, stop, step)
        name = f"{source.name}.{number}" if len(op.results) > 1 else f"{source.name}.{start}_{stop}_{step}"
        stacks[result] = Stacks(expression, name, shape)
        start = stop


def _product(op: Operation, stacks: dict[Value, Stacks]) -> Product | None:
    """The operation as a product of rows and a weight of each expert, None where it is something else."""
    if not isinstance(op, AtenOp) or op.name not in _PRODUCTS:
        return None
    bias: Value | None = None
    if op.name == "aten.linear.default":
        left, right = op.tensor("input"), op.tensor("weight")
        bias = next(iter(op.tensors("bias")), None)
    elif op.name == "aten.addmm.default":
        left, right, bias = op.tensor("mat1"), op.tensor("mat2"), op.tensor("self")
        if op.argument("alpha") != 1 or op.argument("beta") != 1:
            raise refuse(op, "scaled addmm in the body of an expert")
    else:
        left, right = op.operands
    if right not in stacks or left in stacks or tensor_of(left).rank != 2:
        return None
    if bias is not None and bias not in stacks:
        raise refuse(op, "a bias that is not a weight of the expert")
    weight = stacks[right]
    if op.name != "aten.linear.default":
        weight = _permuted(weight, (1, 0))
    return Product(op, left, weight, None if bias is None else stacks[bias])


def _permuted(stack: Stacks, axes: tuple[int, ...]) -> Stacks:
    """The stack with the axes of each expert in another order."""
    shape = tuple(stack.shape[axis] for axis in axes)
    if axes == tuple(range(len(axes))):
        return stack
    if axes == (1, 0):
        expression = stack.expression
        if isinstance(expression, Transpose) and {expression.first, expression.second} == {1, 2}:
            return replace(stack, expression=expression.operand, shape=shape)
        return replace(stack, expression=Transpose(expression, 1, 2), shape=shape)
    return replace(stack, expression=Permute(stack.expression, (0, *[axis + 1 for axis in axes])), shape=shape)
