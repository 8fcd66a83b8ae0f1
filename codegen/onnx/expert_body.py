"""The body of a class of experts on the rows of all its experts: products expert by expert, everything else once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from moec.codegen.onnx.aten_shape import permutation
from moec.codegen.onnx.context import Context, refuse, tensor_of
from moec.codegen.onnx.expert_slices import expert_of, transposed
from moec.codegen.onnx.registry import emit_operation, normalized_axis
from moec.dialects.aten import AtenOp
from moec.dialects.builtin import ConstantOp
from moec.dialects.nn import LayerNormOp, RMSNormOp
from moec.ir.operation import Block, Operation, Value
from moec.weights.expression import Concat, Expression, Permute, Slice, Transpose

_PRODUCTS = ("aten.linear.default", "aten.matmul.default", "aten.mm.default", "aten.addmm.default")
_VIEWS = ("aten.t.default", "aten.transpose.int", "aten.permute.default", "aten.numpy_T.default")
_SLICES = ("aten.slice.Tensor", "aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default")
_COPIES = ("aten.clone.default", "aten.alias.default", "aten.detach.default", "aten.contiguous.default")


@dataclass(frozen=True)
class Rows:
    """The rows [n, H] of a class, sorted by expert; `counts` int64 [experts]; `expert` int64 [n], that of each row."""

    value: ir.Value
    counts: ir.Value
    expert: ir.Value
    experts: int


@dataclass(frozen=True)
class Stacks:
    """One weight per expert: `expression` has a leading axis of experts, `shape` is that of one expert."""

    expression: Expression
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Product:
    """rows @ weight^T + bias, where weight is [out, in] per expert."""

    op: AtenOp
    rows: Value
    weight: Stacks
    bias: Stacks | None


class BodyWalk:
    """Emits one body."""

    def __init__(self, context: Context, op: Operation, rows: Rows) -> None:
        self.b = context.builder
        self.op = op
        self.rows = rows
        self.context = context.nested({"tokens": context.builder.op("Shape", rows.value, start=0, end=1)})
        self.stacks: dict[Value, Stacks] = {}

    def run(self, block: Block, stacks: Sequence[Stacks]) -> ir.Value:
        """The class's outputs [n, H] for the weights `stacks`, one per argument of the block after the rows."""
        self.context.values[block.arguments[0]] = self.rows.value
        self.stacks.update(zip(block.arguments[1:], stacks, strict=True))
        for op in block:
            if op is block.last:
                break
            if isinstance(op, ConstantOp):
                continue
            if op.operands and all(value in self.stacks for value in op.operands):
                self._derive(op)
        products = [found for op in block if (found := self._product(op)) is not None]
        for op in block:
            if op is block.last or isinstance(op, ConstantOp) or op.results[0] in self.stacks:
                continue
            if op.results[0] in self.context.values:
                continue
            product = next((found for found in products if found.op is op), None)
            if product is not None:
                self._project([found for found in products if _may_join(found, product)])
            else:
                self._emit(op)
        return self.context.value(block.terminator.operands[0])

    # weights

    def _derive(self, op: Operation) -> None:
        """A view of a weight stays a weight."""
        source = self.stacks[op.operands[0]]
        if isinstance(op, AtenOp) and op.operand_count == 1:
            if op.name in _COPIES:
                self.stacks[op.results[0]] = source
                return
            if op.name in _VIEWS:
                self.stacks[op.results[0]] = _permuted(source, permutation(op))
                return
            if op.name in _SLICES:
                self._cut(op, source)
                return
        raise refuse(op, "it computes a weight of an expert at run time")

    def _cut(self, op: AtenOp, source: Stacks) -> None:
        axis = normalized_axis(op.argument("dim"), len(source.shape))
        step = op.argument("step") if op.name == "aten.slice.Tensor" else 1
        start = (op.argument("start") or 0) if op.name == "aten.slice.Tensor" else 0
        start += source.shape[axis] if start < 0 else 0
        for number, result in enumerate(op.results):
            shape = tensor_of(result).static_shape
            stop = min(start + shape[axis] * step, source.shape[axis])
            expression = Slice(source.expression, axis + 1, start, stop, step)
            name = f"{source.name}.{number}" if len(op.results) > 1 else f"{source.name}.{start}_{stop}_{step}"
            self.stacks[result] = Stacks(expression, name, shape)
            start = stop

    # products

    def _product(self, op: Operation) -> _Product | None:
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
        if right not in self.stacks or left in self.stacks or tensor_of(left).rank != 2:
            return None
        if bias is not None and bias not in self.stacks:
            raise refuse(op, "a bias that is not a weight of the expert")
        weight = self.stacks[right]
        if op.name != "aten.linear.default":
            weight = _permuted(weight, (1, 0))
        return _Product(op, left, weight, None if bias is None else self.stacks[bias])

    def _project(self, products: Sequence[_Product]) -> None:
        """Products of the same rows, as one product with the weights one below the other."""
        b, rows, first = self.b, self.context.value(products[0].rows), products[0]
        weight = first.weight
        bias = first.bias
        if len(products) > 1:
            weight = replace(weight, expression=Concat(1, tuple(product.weight.expression for product in products)))
            if bias is not None:
                biases = tuple(product.bias.expression for product in products if product.bias is not None)
                bias = replace(bias, expression=Concat(1, biases))
        parts = self._split(rows)
        outputs = [self._multiply(part, index, weight, bias) for index, part in enumerate(parts)]
        result = outputs[0] if len(outputs) == 1 else b.op("Concat", *outputs, axis=0)
        widths = [product.weight.shape[0] for product in products]
        results = (
            (result,) if len(widths) == 1 else b.ops("Split", result, b.ints(*widths), outputs=len(widths), axis=1)
        )
        for product, value in zip(products, results, strict=True):
            self.context.values[product.op.results[0]] = value

    def _split(self, rows: ir.Value) -> tuple[ir.Value, ...]:
        if self.rows.experts == 1:
            return (rows,)
        return self.b.ops("Split", rows, self.rows.counts, outputs=self.rows.experts, axis=0)

    def _multiply(self, rows: ir.Value, index: int, weight: Stacks, bias: Stacks | None) -> ir.Value:
        weights = self.context.weights
        matrix = expert_of(weight.expression, index, weights)
        # Gemm takes either layout, so the checkpoint's own is kept
        swapped = isinstance(matrix, Transpose)
        stored = transposed(matrix) if swapped else matrix
        value = self.context.weight(stored, f"{weight.name}.{index}")
        offset = None
        if bias is not None:
            offset = self.context.weight(expert_of(bias.expression, index, weights), f"{bias.name}.{index}")
        return self.b.op("Gemm", rows, value, offset, transB=0 if swapped else 1)

    # everything else

    def _emit(self, op: Operation) -> None:
        """An operation on rows; a vector of each expert is spread over the expert's rows first."""
        mixed = [value for value in op.operands if value in self.stacks]
        if mixed and isinstance(op, RMSNormOp | LayerNormOp):
            self._emit_norm(op)
            return
        for value in mixed:
            stack = self.stacks[value]
            if len(stack.shape) > 1 or tensor_of(op.results[0]).rank != 2:
                raise refuse(op, "it combines rows and a weight of each expert in a way that has no grouped form")
            self.context.values[value] = self._by_row(stack)
        values = emit_operation(self.context, op)
        self.context.values.update(zip(op.results, values, strict=False))

    def _emit_norm(self, op: RMSNormOp | LayerNormOp) -> None:
        b = self.b
        bias = op.bias if isinstance(op, LayerNormOp) else None
        if op.weight is None or (isinstance(op, RMSNormOp) and op.offset):
            raise refuse(op, "a norm of each expert with an offset")
        x = self.context.value(op.x)
        epsilon = b.number(op.epsilon)
        if isinstance(op, LayerNormOp):
            x = b.op("Sub", x, b.op("ReduceMean", x, b.ints(-1), keepdims=1))
        mean = b.op("ReduceMean", b.op("Mul", x, x), b.ints(-1), keepdims=1)
        y = b.op("Div", x, b.op("Sqrt", b.op("Add", mean, epsilon)))
        y = b.op("Mul", y, self._by_row(self.stacks[op.weight]))
        if bias is not None:
            y = b.op("Add", y, self._by_row(self.stacks[bias]))
        self.context.values[op.results[0]] = y

    def _by_row(self, stack: Stacks) -> ir.Value:
        """The vector of each row's expert, [n, width]."""
        value = self.context.weight(stack.expression, stack.name)
        return self.b.op("Gather", value, self.rows.expert, axis=0)


def _may_join(left: _Product, right: _Product) -> bool:
    """Whether two products have the same rows and can be one."""
    return left.rows is right.rows and (left.bias is None) == (right.bias is None)


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
