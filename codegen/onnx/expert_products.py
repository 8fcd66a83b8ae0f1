"""The products in the body of an expert, and which of its values are weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moec.codegen.onnx.aten_shape import permutation
from moec.codegen.onnx.context import refuse, tensor_of
from moec.codegen.onnx.packed.matrix import PackedMatrix, packed_matrix
from moec.codegen.onnx.registry import normalized_axis
from moec.dialects.aten import AtenOp
from moec.dialects.builtin import ConstantOp
from moec.dialects.quant import DequantOp
from moec.ir.operation import Block, Operation, Value
from moec.weights.expression import Expression, Permute, Slice, Stack, Transpose

_PRODUCTS = ("aten.linear.default", "aten.matmul.default", "aten.mm.default", "aten.addmm.default")
_VIEWS = ("aten.t.default", "aten.transpose.int", "aten.permute.default", "aten.numpy_T.default")
_SLICES = ("aten.slice.Tensor", "aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default")
_COPIES = ("aten.clone.default", "aten.alias.default", "aten.detach.default", "aten.contiguous.default")


@dataclass(frozen=True)
class Stacks:
    """One weight per expert: `expression` has a leading axis of experts, `shape` is that of one expert.

    With `rows_per_token` the weight is one for all experts of the class, the leading axis is 1, and so many slots of a
    token come to it on average. A `packed` matrix has its operands there; its expression is that of its codes.
    """

    expression: Expression
    name: str
    shape: tuple[int, ...]
    rows_per_token: float | None = None
    packed: PackedMatrix[Stacks] | None = None

    @property
    def is_shared(self) -> bool:
        """Whether all experts of the class read the same weight."""
        return self.rows_per_token is not None


def shared_stack(expression: Expression, name: str, shape: tuple[int, ...], rows_per_token: float) -> Stacks:
    """A weight [shape] that all experts of a class share."""
    return Stacks(Stack(0, (expression,)), name, shape, rows_per_token)


@dataclass(frozen=True)
class Product:
    """`result` = rows @ weight^T + bias, where weight is [out, in] per expert; `op` is the operation that has it."""

    op: AtenOp
    result: Value
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

    Raises UnsupportedModelError where a weight is computed from weights by more than unpacking and views.
    """
    known: dict[Value, Stacks] = dict(zip(block.arguments[1:], stacks, strict=True))
    products: list[Product] = []
    for op in block:
        if op is block.last or isinstance(op, ConstantOp):
            continue
        if is_spread(op):
            continue
        if op.operands and all(value in known for value in op.operands):
            _derive(op, known)
        else:
            found = _product(op, known)
            if found is not None:
                products.append(found)
    return BodyProducts(products, known)


def is_spread(op: Operation) -> bool:
    """Whether the operation repeats a vector for every row."""
    return op.name == "aten.expand.default" and not isinstance(tensor_of(op.results[0]).shape[0], int)


def divided(product: Product) -> list[Product]:
    """The product as one for each of its column slices, where nothing else reads it; else itself.

    Rows of gate and up then come out of their products apart, which saves cutting the result.
    """
    width = product.weight.shape[0]
    if product.weight.packed is not None:
        return [product]
    parts: list[Product] = []
    for op in product.result.users:
        cuts = _cuts(op, width)
        if cuts is None:
            return [product]
        for result, cut in zip(op.results, cuts, strict=True):
            bias = None if product.bias is None else _columns(product.bias, cut)
            parts.append(Product(product.op, result, product.rows, _columns(product.weight, cut), bias))
    return parts or [product]


def _cuts(op: Operation, width: int) -> list[range] | None:
    """Which columns of a matrix of rows each result of a slicing operation holds; None for any other operation."""
    if not isinstance(op, AtenOp) or op.name not in _SLICES or tensor_of(op.results[0]).rank != 2:
        return None
    if normalized_axis(op.argument("dim"), 2) != 1:
        return None
    return _ranges(op, 1, width)


def _ranges(op: AtenOp, axis: int, size: int) -> list[range]:
    """The elements along `axis` that each result of a slicing operation takes."""
    is_slice = op.name == "aten.slice.Tensor"
    step = op.argument("step") if is_slice else 1
    start = (op.argument("start") or 0) if is_slice else 0
    start += size if start < 0 else 0
    found = []
    for result in op.results:
        count = tensor_of(result).shape[axis]
        if not isinstance(count, int):
            raise refuse(op, "a slice whose size is known only at run time")
        stop = min(start + count * step, size)
        found.append(range(start, stop, step))
        start = stop
    return found


def _columns(stack: Stacks, cut: range) -> Stacks:
    """The rows `cut` of each expert's weight [out, ...], which are columns of the product."""
    shape = (len(cut), *stack.shape[1:])
    name = f"{stack.name}.{cut.start}_{cut.stop}_{cut.step}"
    inner = stack.expression
    if isinstance(inner, Transpose) and {inner.first, inner.second} == {1, 2}:
        # below the transposition, so that the weight is stored as the checkpoint has it
        expression = Transpose(Slice(inner.operand, 2, cut.start, cut.stop, cut.step), 1, 2)
        return replace(stack, expression=expression, name=name, shape=shape)
    return replace(stack, expression=Slice(inner, 1, cut.start, cut.stop, cut.step), name=name, shape=shape)


def _derive(op: Operation, stacks: dict[Value, Stacks]) -> None:
    """A view of a weight stays a weight, and so does a packed matrix."""
    source = stacks[op.operands[0]]
    if isinstance(op, DequantOp):
        packed = packed_matrix(op).map(lambda _, value: stacks[value])
        shape = (packed.rows, packed.columns)
        shared = source.rows_per_token if all(stack.is_shared for _, stack in packed.operands) else None
        stacks[op.weight] = Stacks(source.expression, source.name, shape, shared, packed)
        return
    if source.packed is not None:
        raise refuse(op, "it changes a packed weight of an expert")
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
    for result, cut in zip(op.results, _ranges(op, axis, source.shape[axis]), strict=True):
        expression = Slice(source.expression, axis + 1, cut.start, cut.stop, cut.step)
        name = f"{source.name}.{cut.start}_{cut.stop}_{cut.step}"
        stacks[result] = replace(source, expression=expression, name=name, shape=tensor_of(result).static_shape)


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
    if weight.packed is not None and op.name != "aten.linear.default":
        raise refuse(op, "it multiplies with a packed weight that is not transposed")
    if op.name != "aten.linear.default":
        weight = _permuted(weight, (1, 0))
    return Product(op, op.results[0], left, weight, None if bias is None else stacks[bias])


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
