"""The body of a class of experts on the rows of all its experts: products expert by expert, everything else once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import onnx_ir as ir

from moec.codegen.onnx.context import Context, NamedWeight, refuse, tensor_of
from moec.codegen.onnx.expert_products import Product, Stacks, divided, find_products, is_spread
from moec.codegen.onnx.expert_rows import ClassRows
from moec.codegen.onnx.packed.kernel import kernel_products, store_matrix
from moec.codegen.onnx.packed.matrix import PackedMatrix
from moec.codegen.onnx.packed.product import packed_product, usable_form
from moec.codegen.onnx.registry import emit_operation
from moec.dialects.builtin import ConstantOp
from moec.dialects.moe import ExpertsOp
from moec.dialects.nn import LayerNormOp, RMSNormOp
from moec.ir.operation import Block, Operation, Value
from moec.weights.expression import Concat, Expression, Transpose
from moec.weights.rows import row_of, simplified


class BodyWalk:
    """Emits one body."""

    def __init__(self, context: Context, op: ExpertsOp, rows: ClassRows, *, apart: bool, each: bool) -> None:
        """`apart`: one product per expert for each of gate and up, instead of one whose result is cut.

        It is faster, since nothing is copied to be cut, at the price of one more node per expert.
        `each`: what lies between two products is computed expert by expert, too, on rows that are still in the cache.
        """
        self.apart, self.each = apart, each
        self.b = context.builder
        self.op = op
        self.rows = rows
        self.context = context.nested({"tokens": rows.total})
        self.stacks: dict[Value, Stacks] = {}
        self.tokens: Value
        # results that lie in pieces, expert by expert
        self.pieces: dict[Value, tuple[ir.Value, ...]] = {}

    def run(self, block: Block, stacks: Sequence[Stacks]) -> tuple[ir.Value, ...]:
        """The class's outputs [n, H] in pieces that follow each other, for the weights `stacks` of the body."""
        self.tokens = block.arguments[0]
        found = find_products(block, stacks)
        self.stacks, products = found.stacks, found.products
        for op in block:
            if op is block.last or isinstance(op, ConstantOp) or op.results[0] in self.stacks:
                continue
            if op.results[0] in self.context.values or op.results[0] in self.pieces:
                continue
            product = next((candidate for candidate in products if candidate.op is op), None)
            if product is None:
                self._emit(op)
                continue
            if product.weight.is_shared:
                self._share(product)
                continue
            joined = [candidate for candidate in products if _may_join(candidate, product)]
            if self.apart or self._lie_apart(joined):
                for part in divided(product):
                    self._project([part])
            else:
                self._project(joined)
        result = block.terminator.operands[0]
        return self.pieces.get(result) or (self._value(result),)

    def _value(self, value: Value) -> ir.Value:
        """The rows of all experts together; made from pieces when first read."""
        if value not in self.context.values:
            if value is self.tokens:
                self.context.values[value] = self.rows.together()
            elif value in self.pieces:
                self.context.values[value] = self.b.op("Concat", *self.pieces[value], axis=0)
        return self.context.value(value)

    # products

    def _project(self, products: Sequence[Product]) -> None:
        """Products of the same rows, as one product with the weights one below the other."""
        b, first = self.b, products[0]
        weight = first.weight
        bias = first.bias
        if len(products) > 1:
            weight = replace(weight, expression=Concat(1, tuple(product.weight.expression for product in products)))
            if bias is not None:
                biases = tuple(product.bias.expression for product in products if product.bias is not None)
                bias = replace(bias, expression=Concat(1, biases))
        outputs = self._multiply_all(self._by_expert(first.rows), weight, bias)
        if len(products) == 1:
            self.pieces[first.result] = outputs
            return
        result = outputs[0] if len(outputs) == 1 else b.op("Concat", *outputs, axis=0)
        widths = [product.weight.shape[0] for product in products]
        results = b.ops("Split", result, b.ints(*widths), outputs=len(widths), axis=1)
        for product, value in zip(products, results, strict=True):
            self.context.values[product.result] = value

    def _share(self, product: Product) -> None:
        """One product for the whole class; of the tokens themselves, where most of them come to the class anyway."""
        own_bias = product.bias if product.bias is not None and not product.bias.is_shared else None
        bias = None if own_bias is not None else product.bias
        expected = product.weight.rows_per_token or 0.0
        if product.rows is self.tokens and expected >= 1:
            by_token = self._multiply(self.rows.x, 0, product.weight, bias)
            result = self.b.op("Gather", by_token, self.rows.tokens(), axis=0)
        else:
            result = self._multiply(self._value(product.rows), 0, product.weight, bias)
        if own_bias is not None:
            result = self.b.op("Add", result, self._by_row(own_bias))
        self.context.values[product.result] = result

    def _lie_apart(self, joined: Sequence[Product]) -> bool:
        """Whether the weights of products can be read in place, which they could not as one."""
        parts = [part for product in joined for part in divided(product)]
        return len(parts) > 1 and all(self.context.in_place(_row(part.weight, 0, self.context)) for part in parts)

    def _by_expert(self, rows: Value) -> Sequence[ir.Value]:
        if rows is self.tokens:
            return self.rows.by_expert()
        if rows in self.pieces:
            return self.pieces[rows]
        if self.rows.experts == 1:
            return (self._value(rows),)
        return self.b.ops("Split", self._value(rows), self.rows.counts(), outputs=self.rows.experts, axis=0)

    def _multiply_all(self, parts: Sequence[ir.Value], weight: Stacks, bias: Stacks | None) -> tuple[ir.Value, ...]:
        """The rows of each expert, times its weight."""
        if weight.packed is None or len(parts) == 1:
            return tuple(self._multiply(part, index, weight, bias) for index, part in enumerate(parts))
        form = usable_form(self.context, weight.packed.format, weight.packed.columns)
        assert form is not None  # other experts are decoded in a loop, one in each round
        matrices, offsets = [], []
        for index in range(len(parts)):
            with self._place(index, weight):
                offsets.append(self._offset(index, bias))
                matrices.append(store_matrix(self.context, self._packed(index, weight.packed), form))
        return kernel_products(self.context, parts, matrices, form, offsets)

    def _multiply(self, rows: ir.Value, index: int, weight: Stacks, bias: Stacks | None) -> ir.Value:
        with self._place(index, weight):
            offset = self._offset(index, bias)
            if weight.packed is not None:
                return packed_product(self.context, rows, self._packed(index, weight.packed), offset)
            matrix = _row(weight, index, self.context)
            # Gemm takes either layout, so the checkpoint's own is kept
            swapped = isinstance(matrix, Transpose)
            stored = _transposed(matrix) if swapped else matrix
            value = self.context.weight(stored, _row_name(weight, index))
            return self.b.op("Gemm", rows, value, offset, transB=0 if swapped else 1)

    def _place(self, index: int, weight: Stacks) -> AbstractContextManager[None]:
        """Weights first used inside belong to this expert."""
        return self.b.expert(len(self.context.lowerings), self.rows.number, -1 if weight.is_shared else index)

    def _offset(self, index: int, bias: Stacks | None) -> ir.Value | None:
        return None if bias is None else self.context.weight(_row(bias, index, self.context), _row_name(bias, index))

    def _packed(self, index: int, packed: PackedMatrix[Stacks]) -> PackedMatrix[NamedWeight]:
        return packed.map(lambda _, stack: NamedWeight(_row(stack, index, self.context), _row_name(stack, index)))

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
        if self.each and self._emit_each(op):
            return
        for value in op.operands:
            self._value(value)
        if mixed and is_spread(op) and self._is_by_row(self.stacks[mixed[0]]):
            self.context.values[op.results[0]] = self.context.values[mixed[0]]
            return
        values = emit_operation(self.context, op)
        self.context.values.update(zip(op.results, values, strict=False))

    def _emit_each(self, op: Operation) -> bool:
        """The operation on the rows of each expert, where they lie in pieces; False where they do not."""
        computed = [value for value in dict.fromkeys(op.operands) if not isinstance(value.defining_op, ConstantOp)]
        if not computed or any(value not in self.pieces for value in computed):
            return False
        results = []
        for parts in zip(*[self.pieces[value] for value in computed], strict=True):
            inner = self.context.nested({"tokens": partial(self.b.op, "Shape", parts[0], start=0, end=1)})
            inner.values.update(zip(computed, parts, strict=True))
            results.append(emit_operation(inner, op))
        self.pieces.update(zip(op.results, zip(*results, strict=True), strict=False))
        return True

    def _emit_norm(self, op: RMSNormOp | LayerNormOp) -> None:
        b = self.b
        bias = op.bias if isinstance(op, LayerNormOp) else None
        if op.weight is None or (isinstance(op, RMSNormOp) and op.offset):
            raise refuse(op, "a norm of each expert with an offset")
        x = self._value(op.x)
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
        """The vector of each row's expert, [n, width]; [width] where all experts have the same."""
        if not self._is_by_row(stack):
            return self.context.weight(_row(stack, 0, self.context), _row_name(stack, 0))
        value = self.context.weight(stack.expression, stack.name, vectors=True)
        return self.b.op("Gather", value, self.rows.expert_of_row(), axis=0)

    def _is_by_row(self, stack: Stacks) -> bool:
        return self.rows.experts > 1 and not stack.is_shared


def _row(stack: Stacks, index: int, context: Context) -> Expression:
    """The weight of an expert, which may be that of all."""
    return simplified(row_of(stack.expression, 0 if stack.is_shared else index, context.weights), context.weights)


def _row_name(stack: Stacks, index: int) -> str:
    return stack.name if stack.is_shared else f"{stack.name}.{index}"


def _may_join(left: Product, right: Product) -> bool:
    """Whether two products have the same rows and can be one."""
    if left is right:
        return True
    shared = left.weight.is_shared or right.weight.is_shared
    packed = left.weight.packed is not None or right.weight.packed is not None
    if packed:
        return False
    return left.rows is right.rows and (left.bias is None) == (right.bias is None) and not shared


def _transposed(expression: Expression) -> Expression:
    """A matrix transposed; twice is none."""
    if isinstance(expression, Transpose) and {expression.first, expression.second} == {0, 1}:
        return expression.operand
    return Transpose(expression, 0, 1)
