"""Products with packed matrices by `com.microsoft::MatMulNBits`.

Products that take more than this operator are a call of a function: one for the matrices of a class of experts, which
are rearranged together. The file has one function for all calls of equal format, sizes and number. ONNX Runtime inlines
the calls when it loads the file, and then folds what depends on nothing but weights, in time that grows as the square
of the number of nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moec.codegen.onnx.context import Context, NamedWeight
from moec.codegen.onnx.functions import DOMAIN, define_function
from moec.codegen.onnx.graph import MICROSOFT, GraphBuilder
from moec.codegen.onnx.packed.decode import as_float, block_scales
from moec.codegen.onnx.packed.kernel_form import KernelForm, accuracy_level
from moec.codegen.onnx.packed.matrix import PackedMatrix, T
from moec.codegen.onnx.packed.rearrange import Packing, Table, rearrange
from moec.dialects.quant import BlockFloat, Format, Integer, Ternary, TritPacking, ZeroPoint
from moec.ir.types import DType
from moec.weights.expression import Reshape

OPERATOR = "MatMulNBits"


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix for the operator: the shapes in which its operands are stored, and their values."""

    shapes: PackedMatrix[tuple[int, ...]]
    values: PackedMatrix[ir.Value]


def store_matrix(context: Context, packed: PackedMatrix[NamedWeight], form: KernelForm) -> StoredMatrix:
    """Stores the operands, in the operator's shapes where it reads their bytes as they are."""

    def shaped(name: str, weight: NamedWeight) -> NamedWeight:
        shape = shape_as_read(packed, form, name)
        # what something else reads, too, is stored once
        again = str(weight.expression) in context.gathered
        return weight if shape is None or again else NamedWeight(Reshape(weight.expression, shape), weight.name)

    found = packed.map(shaped)
    return StoredMatrix(
        found.map(lambda _, weight: context.weights.shape_dtype(weight.expression)[0]),
        found.map(lambda _, weight: context.stored_as_is(weight.expression, weight.name)),
    )


def kernel_products(
    context: Context,
    rows: Sequence[ir.Value],
    matrices: Sequence[StoredMatrix],
    form: KernelForm,
    biases: Sequence[ir.Value | None],
) -> tuple[ir.Value, ...]:
    """rows [..., columns] times the transpose of its matrix, plus its bias [N], for each of some matrices alike."""
    b = context.builder
    level = accuracy_level(context.options.activations)
    products = KernelProducts(matrices[0].shapes, form, level, len(rows), biases[0] is not None)
    values = products.packed.map(lambda name, _: tuple(matrix.values[name] for matrix in matrices))
    if products.are_single_nodes:
        return _Emission(b, products, values).emit(rows, biases)
    if products not in context.products:
        context.products[products] = _define(context, products)
    operands = [value for _, parts in values.operands for value in parts]
    return b.ops(context.products[products], *rows, *operands, *biases, outputs=len(rows), domain=DOMAIN)


@dataclass(frozen=True)
class KernelProducts:
    """All that the nodes of `count` products depend on; `packed` has the shapes in which operands are stored."""

    packed: PackedMatrix[tuple[int, ...]]
    form: KernelForm
    accuracy_level: int
    count: int
    have_bias: bool

    @property
    def are_single_nodes(self) -> bool:
        """Whether the operator reads everything as it is stored."""
        read = all(shape_as_read(self.packed, self.form, name) == shape for name, shape in self.packed.operands)
        return read and not self.form.in_planes and not self.form.correction


def shape_as_read(packed: PackedMatrix[T], form: KernelForm, name: str) -> tuple[int, ...] | None:
    """The shape in which the operator reads an operand whose bytes are what it needs; None where they are not."""
    kind, rows, blocks = packed.format, packed.rows, -(-packed.columns // form.block)
    same_bits = isinstance(kind, Integer) and kind.bits == form.bits and not form.in_planes
    scale_rows, groups = kind.scale_shape(rows, packed.columns)
    by_block = scale_rows == rows and form.repeats == 1
    match name:
        case "codes" if same_bits and packed.columns % form.block == 0:
            return (rows, blocks, form.block * form.bits // 8)
        case "scales" if by_block and packed.number_type is DType.F32 and form.multiplier == 1 and not form.correction:
            return (rows * groups,)
        case "zero_points" if by_block and same_bits and form.own_zeros:
            assert isinstance(kind, Integer)
            return (rows * kind.zero_point_shape(rows, packed.columns)[1],)
    return None


def _define(context: Context, products: KernelProducts) -> str:
    """The name of the function that computes the products."""
    body = GraphBuilder(context.builder.opset, constants_as_nodes=True)

    def inputs(name: str) -> tuple[ir.Value, ...]:
        return tuple(body.input(f"{name}_{index}", None, None) for index in range(products.count))

    rows, values = inputs("x"), products.packed.map(lambda name, _: inputs(name))
    biases = inputs("bias") if products.have_bias else [None] * products.count
    for index, y in enumerate(_Emission(body, products, values).emit(rows, biases)):
        body.output(y, f"y_{index}", None, None)
    return define_function(context, "products", body)


class _Emission:
    """Emits products; what has to be rearranged is that of all matrices, one below the other."""

    def __init__(self, b: GraphBuilder, products: KernelProducts, values: PackedMatrix[tuple[ir.Value, ...]]) -> None:
        self.b, self.products, self.values, self.count = b, products, values, products.count
        self.form, self.packed, self.kind = products.form, products.packed, products.packed.format
        self.rows, self.blocks = self.packed.rows, -(-self.packed.columns // self.form.block)
        self.scale_rows, self.groups = self.kind.scale_shape(self.rows, self.packed.columns)

    def emit(self, rows: Sequence[ir.Value], biases: Sequence[ir.Value | None]) -> tuple[ir.Value, ...]:
        """Each of `rows` times the transpose of its matrix, plus its bias."""
        b, form = self.b, self.form
        scales = self._scales()
        if not form.in_planes:
            found = list(map(self._multiply, rows, self._codes(), scales, self._zeros(), biases))
        else:
            low, high = self._planes()
            low_zeros, high_zeros = self._zero_planes()
            fine = map(self._multiply, rows, low, scales, low_zeros, biases)
            coarse = map(self._multiply, rows, high, scales, high_zeros, [None] * self.count)
            found = [b.op("Add", y, b.op("Mul", more, b.number(16.0))) for y, more in zip(fine, coarse, strict=True)]
        if form.correction:
            found = [b.op("Add", y, more) for y, more in zip(found, self._corrections(rows), strict=True)]
        return tuple(found)

    def _multiply(
        self, x: ir.Value, codes: ir.Value, scales: ir.Value, zeros: ir.Value | None, bias: ir.Value | None
    ) -> ir.Value:
        return self.b.op(
            OPERATOR,
            x,
            codes,
            scales,
            zeros,
            None,
            bias,
            domain=MICROSOFT,
            K=self.packed.columns,
            N=self.rows,
            bits=4 if self.form.in_planes else self.form.bits,
            block_size=self.form.block,
            accuracy_level=self.products.accuracy_level,
        )

    # operands

    def _as_read(self, name: str) -> tuple[ir.Value, ...] | None:
        """An operand whose bytes are what the operator needs, in the operator's shape; None where they are not."""
        shape = shape_as_read(self.packed, self.form, name)
        if shape is None:
            return None
        parts, stored = self.values[name], self.packed[name]
        return parts if stored == shape else tuple(self.b.reshape(value, shape) for value in parts)

    def _together(self, name: str) -> ir.Value:
        """An operand of all matrices, one below the other."""
        parts = self.values[name]
        return parts[0] if self.count == 1 else self.b.op("Concat", *parts, axis=0)

    def _several(self, *names: str) -> PackedMatrix[ir.Value]:
        """The operands with these names, if the format has them, of all matrices."""
        packed = self.packed
        some = tuple((name, self._together(name)) for name in names if packed.get(name) is not None)
        return PackedMatrix(packed.format, self.count * packed.rows, packed.columns, packed.number_type, some)

    def _apart(self, together: ir.Value, *shape: int) -> tuple[ir.Value, ...]:
        """The part [shape] of each matrix."""
        first, *rest = shape
        value = self.b.reshape(together, (self.count * first, *rest))
        if self.count == 1:
            return (value,)
        return self.b.ops("Split", value, self.b.ints(*[first] * self.count), outputs=self.count, axis=0)

    def _spread(self, values: ir.Value) -> ir.Value:
        """Something of each block, [count * N, blocks], of something of each scale."""
        if self.scale_rows == self.rows and self.form.repeats == 1:
            return values
        apart = self.b.reshape(values, (self.count, self.scale_rows, self.groups, 1))
        spread = self.b.op("Expand", apart, self.b.ints(self.count, self.rows, self.groups, self.form.repeats))
        return self.b.reshape(spread, (self.count * self.rows, self.blocks))

    # codes

    def _codes(self) -> tuple[ir.Value, ...]:
        """u8 [N, blocks, bytes of a block] of each matrix."""
        return self._as_read("codes") or self._rearranged(self._table(), self.form.bits)

    def _planes(self) -> tuple[tuple[ir.Value, ...], tuple[ir.Value, ...]]:
        """The lower and the upper halves of codes of 8 bits."""
        table = self._table()
        return self._rearranged(table & 15, 4), self._rearranged(table >> 4, 4)

    def _rearranged(self, table: Table, bits: int) -> tuple[ir.Value, ...]:
        """Codes of `bits` by the table of stored ones."""
        size = self.form.block * bits // 8
        codes = self._together("codes")
        codes = rearrange(self.b, codes, self.packed.columns, _packing(self.kind), table, bits, self.blocks * size)
        return self._apart(codes, self.rows, self.blocks, size)

    def _table(self) -> Table:
        """The operator's code of each stored one."""
        if self.form.own_zeros:
            return np.arange(len(self.form.numbers))
        return np.array(self.form.numbers) + self.form.zero

    # scales

    def _scales(self) -> tuple[ir.Value, ...]:
        """float32 [N * blocks] of each matrix."""
        found = self._as_read("scales")
        if found is not None:
            return found
        b, kind = self.b, self.kind
        if isinstance(kind, BlockFloat):
            sizes = {"scales": (self.scale_rows, self.groups), "tensor_scale": (1, 1)}
            several = self._several("scales", "tensor_scale")
            apart = several.map(lambda name, value: b.reshape(value, (self.count, *sizes[name])))
            values = block_scales(b, apart, kind)
        else:
            values = as_float(b, self._several("scales"), "scales")
        if self.form.multiplier != 1.0:
            values = b.op("Mul", values, b.number(self.form.multiplier))
        return self._apart(self._spread(values), self.rows * self.blocks)

    # zero points

    def _zeros(self) -> Sequence[ir.Value | None]:
        """u8 [N * bytes] of each matrix, packed, None where they are the middle."""
        if not self.form.own_zeros:
            return [None] * self.count
        return self._as_read("zero_points") or self._rearranged_zeros(self.form.bits)

    def _zero_planes(self) -> tuple[Sequence[ir.Value], Sequence[ir.Value | None]]:
        if not self.form.own_zeros:
            # 128 is 8 in the upper half, which is the operator's own middle, and 0 in the lower one
            size = self.rows * -(-self.blocks // 2)
            low = self.b.op("Expand", self.b.constant(np.array(0, np.uint8)), self.b.ints(size))
            return [low] * self.count, [None] * self.count
        return self._rearranged_zeros(4), self._rearranged_zeros(4, above=4)

    def _rearranged_zeros(self, bits: int, above: int = 0) -> tuple[ir.Value, ...]:
        """So many bits of the zero points of all blocks, those above the lowest ones, packed."""
        assert isinstance(self.kind, Integer)
        codes, packing = self._together("zero_points"), Packing(self.kind.bits)
        if self.scale_rows != self.rows or self.form.repeats != 1:
            single = rearrange(self.b, codes, self.groups, packing, _all_codes(packing), 8, self.groups)
            codes, packing = self._spread(single), Packing(8)
        table = _all_codes(packing) >> above & ((1 << bits) - 1)
        nbytes = -(-self.blocks * bits // 8)
        return self._apart(rearrange(self.b, codes, self.blocks, packing, table, bits, nbytes), self.rows * nbytes)

    def _corrections(self, rows: Sequence[ir.Value]) -> tuple[ir.Value, ...]:
        """What zero points that are numbers add: sums of each group of columns, times scale * (middle - zero point)."""
        b, kind = self.b, self.kind
        assert isinstance(kind, Integer) and kind.zero_point is ZeroPoint.FLOAT
        several = self._several("scales", "zero_points")
        distance = b.op("Sub", b.number(float(1 << (kind.bits - 1))), as_float(b, several, "zero_points"))
        offsets = b.op("Mul", as_float(b, several, "scales"), distance)
        offsets = b.reshape(offsets, (self.count, self.scale_rows, self.groups))
        if self.scale_rows != self.rows:
            offsets = b.op("Expand", offsets, b.ints(self.count, self.rows, self.groups))
        by_group = self._apart(b.op("Transpose", offsets, perm=[0, 2, 1]), self.groups, self.rows)
        # a product, since ReduceSum of ONNX Runtime 1.31 gives no rows a wrong shape
        group = self.packed.columns // self.groups
        ones = b.constant(np.ones((group, 1), np.float32))
        found = []
        for x, factors in zip(rows, by_group, strict=True):
            shape = b.op("Concat", b.op("Shape", x, end=-1), b.ints(self.groups, group), axis=0)
            sums = b.op("Squeeze", b.op("MatMul", b.op("Reshape", x, shape), ones), b.ints(-1))
            found.append(b.op("MatMul", sums, factors))
        return tuple(found)


def _packing(kind: Format) -> Packing:
    if isinstance(kind, Ternary):
        return Packing(None if kind.packing is TritPacking.FIVE_PER_BYTE else 2)
    assert isinstance(kind, Integer | BlockFloat)
    return Packing(kind.bits if isinstance(kind, Integer) else kind.element.bits)


def _all_codes(packing: Packing) -> Table:
    assert packing.bits is not None
    return np.arange(1 << packing.bits)
