"""The body of a class of experts on the rows of all its experts: products expert by expert, everything else once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from moec.codegen.onnx.context import Context, refuse, tensor_of
from moec.codegen.onnx.expert_products import Product, Stacks, divided, find_products
from moec.codegen.onnx.registry import emit_operation
from moec.dialects.builtin import ConstantOp
from moec.dialects.nn import LayerNormOp, RMSNormOp
from moec.ir.operation import Block, Operation, Value
from moec.weights.expression import Concat, Expression, Transpose
from moec.weights.rows import row_of


@dataclass(frozen=True)
class Rows:
    """The rows [n, H] of a class, sorted by expert; `counts` int64 [experts]; `expert` int64 [n], that of each row."""

    value: ir.Value
    counts: ir.Value
    expert: ir.Value
    experts: int


class BodyWalk:
    """Emits one body."""

    def __init__(self, context: Context, op: Operation, rows: Rows, *, apart: bool) -> None:
        """`apart`: one product per expert for each of gate and up, instead of one whose result is cut.

        It is faster, since nothing is copied to be cut, at the price of one more node per expert.
        """
        self.apart = apart
        self.b = context.builder
        self.op = op
        self.rows = rows
        self.context = context.nested({"tokens": context.builder.op("Shape", rows.value, start=0, end=1)})
        self.stacks: dict[Value, Stacks] = {}

    def run(self, block: Block, stacks: Sequence[Stacks]) -> ir.Value:
        """The class's outputs [n, H] for the weights `stacks`, one per argument of the block after the rows."""
        self.context.values[block.arguments[0]] = self.rows.value
        found = find_products(block, stacks)
        self.stacks, products = found.stacks, found.products
        for op in block:
            if op is block.last or isinstance(op, ConstantOp) or op.results[0] in self.stacks:
                continue
            if op.results[0] in self.context.values:
                continue
            product = next((candidate for candidate in products if candidate.op is op), None)
            if product is None:
                self._emit(op)
            elif self.apart:
                for part in divided(product):
                    self._project([part])
            else:
                self._project([candidate for candidate in products if _may_join(candidate, product)])
        return self.context.value(block.terminator.operands[0])

    # products

    def _project(self, products: Sequence[Product]) -> None:
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
            self.context.values[product.result] = value

    def _split(self, rows: ir.Value) -> tuple[ir.Value, ...]:
        if self.rows.experts == 1:
            return (rows,)
        return self.b.ops("Split", rows, self.rows.counts, outputs=self.rows.experts, axis=0)

    def _multiply(self, rows: ir.Value, index: int, weight: Stacks, bias: Stacks | None) -> ir.Value:
        weights = self.context.weights
        matrix = row_of(weight.expression, index, weights)
        # Gemm takes either layout, so the checkpoint's own is kept
        swapped = isinstance(matrix, Transpose)
        stored = _transposed(matrix) if swapped else matrix
        value = self.context.weight(stored, f"{weight.name}.{index}")
        offset = None
        if bias is not None:
            offset = self.context.weight(row_of(bias.expression, index, weights), f"{bias.name}.{index}")
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


def _may_join(left: Product, right: Product) -> bool:
    """Whether two products have the same rows and can be one."""
    return left.rows is right.rows and (left.bias is None) == (right.bias is None)


def _transposed(expression: Expression) -> Expression:
    """A matrix transposed; twice is none."""
    if isinstance(expression, Transpose) and {expression.first, expression.second} == {0, 1}:
        return expression.operand
    return Transpose(expression, 0, 1)
