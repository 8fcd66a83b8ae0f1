"""Products with packed matrices by `com.microsoft::MatMulNBits`.

A product that takes more than this operator is a call of a function, one for all matrices of equal format and sizes:
what rearranges a matrix is some forty nodes, which would otherwise be there for each expert. ONNX Runtime inlines the
calls when it loads the file, and then folds what depends on nothing but weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moec.codegen.onnx.context import Context, NamedWeight
from moec.codegen.onnx.functions import DOMAIN, define_function
from moec.codegen.onnx.graph import MICROSOFT, GraphBuilder
from moec.codegen.onnx.packed.decode import as_float, block_scales, unpack_bits, unpack_trits
from moec.codegen.onnx.packed.kernel_form import KernelForm, accuracy_level
from moec.codegen.onnx.packed.matrix import PackedMatrix, T
from moec.dialects.quant import BlockFloat, Integer, Ternary, TritPacking, ZeroPoint
from moec.ir.types import DType
from moec.weights.expression import Reshape

OPERATOR = "MatMulNBits"


def kernel_product(
    context: Context, x: ir.Value, packed: PackedMatrix[NamedWeight], form: KernelForm, bias: ir.Value | None
) -> ir.Value:
    """x [..., columns] times the transpose of the matrix, plus bias [N]."""
    b = context.builder

    def stored(name: str, weight: NamedWeight) -> NamedWeight:
        shape = shape_as_read(packed, form, name)
        # what something else reads, too, is stored once
        again = str(weight.expression) in context.gathered
        return weight if shape is None or again else NamedWeight(Reshape(weight.expression, shape), weight.name)

    found = packed.map(stored)
    shapes = found.map(lambda _, weight: context.weights.shape_dtype(weight.expression)[0])
    product = KernelProduct(shapes, form, accuracy_level(context.options.activations), bias is not None)
    values = found.map(lambda _, weight: context.stored_as_is(weight.expression, weight.name))
    if product.is_one_node:
        return _Emission(b, product, values).emit(x, bias)
    if product not in context.products:
        context.products[product] = _define(context, product)
    return b.op(context.products[product], x, *[value for _, value in values.operands], bias, domain=DOMAIN)


@dataclass(frozen=True)
class KernelProduct:
    """All that the nodes of a product depend on; `packed` has the shapes in which the operands are stored."""

    packed: PackedMatrix[tuple[int, ...]]
    form: KernelForm
    accuracy_level: int
    has_bias: bool

    @property
    def is_one_node(self) -> bool:
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


def _define(context: Context, product: KernelProduct) -> str:
    """The name of the function that computes the product."""
    body = GraphBuilder(context.builder.opset, constants_as_nodes=True)
    x = body.input("x", None, None)
    values = product.packed.map(lambda name, _: body.input(name, None, None))
    bias = body.input("bias", None, None) if product.has_bias else None
    body.output(_Emission(body, product, values).emit(x, bias), "y", None, None)
    return define_function(context, "product", body)


class _Emission:
    """Emits a product."""

    def __init__(self, b: GraphBuilder, product: KernelProduct, values: PackedMatrix[ir.Value]) -> None:
        self.b, self.product, self.values = b, product, values
        self.form, self.packed, self.kind = product.form, product.packed, product.packed.format
        self.blocks = -(-self.packed.columns // self.form.block)

    def emit(self, x: ir.Value, bias: ir.Value | None) -> ir.Value:
        """x times the transpose of the matrix, plus bias."""
        b, form = self.b, self.form
        scales = self._scales()
        if not form.in_planes:
            y = self._multiply(x, self._codes(), scales, self._zeros(), bias)
        else:
            (low, high), (low_zeros, high_zeros) = self._planes(), self._zero_planes()
            fine = self._multiply(x, low, scales, low_zeros, bias)
            coarse = self._multiply(x, high, scales, high_zeros, None)
            y = b.op("Add", fine, b.op("Mul", coarse, b.number(16.0)))
        return b.op("Add", y, self._correction(x)) if form.correction else y

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
            N=self.packed.rows,
            bits=4 if self.form.in_planes else self.form.bits,
            block_size=self.form.block,
            accuracy_level=self.product.accuracy_level,
        )

    # codes

    def _as_read(self, name: str) -> ir.Value | None:
        """An operand whose bytes are what the operator needs, in the operator's shape; None where they are not."""
        shape = shape_as_read(self.packed, self.form, name)
        if shape is None or self.packed[name] == shape:
            return None if shape is None else self.values[name]
        return self.b.reshape(self.values[name], shape)

    def _codes(self) -> ir.Value:
        """u8 [N, blocks, bytes of a block]."""
        found = self._as_read("codes")
        if found is not None:
            return found
        return self._by_block(pack_bits(self.b, self._rearranged(), self.form.bits), self.form.bits)

    def _planes(self) -> tuple[ir.Value, ir.Value]:
        """The lower and the upper halves of codes of 8 bits, packed."""
        low, high = _halves(self.b, self._rearranged())
        return tuple(self._by_block(pack_bits(self.b, part, 4), 4) for part in (low, high))  # type: ignore[return-value]

    def _by_block(self, packed: ir.Value, bits: int) -> ir.Value:
        return self.b.reshape(packed, (self.packed.rows, self.blocks, self.form.block * bits // 8))

    def _rearranged(self) -> ir.Value:
        """Codes of the operator, u8 [N, blocks * block], one in a byte."""
        b, kind, columns = self.b, self.kind, self.packed.columns
        codes = self.values["codes"]
        if isinstance(kind, Ternary) and kind.packing is TritPacking.FIVE_PER_BYTE:
            single = unpack_trits(b, codes, columns)
        else:
            single = unpack_bits(b, codes, _code_bits(kind), columns)
        table = self._table()
        if not np.array_equal(table, np.arange(len(table))):
            single = b.op("Gather", b.constant(table), b.cast(single, DType.I32), axis=0)
        missing = self.blocks * self.form.block - columns
        return b.op("Pad", single, b.ints(0, 0, 0, missing), _zero(b)) if missing else single

    def _table(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """The operator's code of each stored one."""
        if self.form.own_zeros:
            return np.arange(len(self.form.numbers), dtype=np.uint8)
        return (np.array(self.form.numbers) + self.form.zero).astype(np.uint8)

    # scales

    def _scales(self) -> ir.Value:
        """float32 [N * blocks]."""
        b, kind = self.b, self.kind
        found = self._as_read("scales")
        if found is not None:
            return found
        if isinstance(kind, BlockFloat):
            values = block_scales(b, self.values, kind)
        else:
            values = as_float(b, self.values, "scales")
        if self.form.multiplier != 1.0:
            values = b.op("Mul", values, b.number(self.form.multiplier))
        return b.reshape(self._spread(values), (-1,))

    def _spread(self, values: ir.Value) -> ir.Value:
        """[N, blocks] of [R, G]."""
        rows, groups = self.kind.scale_shape(self.packed.rows, self.packed.columns)
        if rows == self.packed.rows and self.form.repeats == 1:
            return values
        shape = (self.packed.rows, groups, self.form.repeats)
        spread = self.b.op("Expand", self.b.reshape(values, (rows, groups, 1)), self.b.ints(*shape))
        return self.b.reshape(spread, (self.packed.rows, self.blocks))

    # zero points

    def _zeros(self) -> ir.Value | None:
        """u8 [N * bytes], packed, None where they are the middle."""
        if not self.form.own_zeros:
            return None
        found = self._as_read("zero_points")
        if found is not None:
            return found
        assert isinstance(self.kind, Integer)
        return self._packed_zeros(self._spread_zeros(self.kind), self.form.bits)

    def _zero_planes(self) -> tuple[ir.Value, ir.Value | None]:
        if not self.form.own_zeros:
            # 128 is 8 in the upper half, which is the operator's own middle, and 0 in the lower one
            size = self.packed.rows * -(-self.blocks // 2)
            return self.b.op("Expand", _zero(self.b), self.b.ints(size)), None
        assert isinstance(self.kind, Integer)
        low, high = _halves(self.b, self._spread_zeros(self.kind))
        return self._packed_zeros(low, 4), self._packed_zeros(high, 4)

    def _spread_zeros(self, kind: Integer) -> ir.Value:
        """Zero points u8 [N, blocks], one in a byte."""
        groups = kind.scale_shape(self.packed.rows, self.packed.columns)[1]
        return self._spread(unpack_bits(self.b, self.values["zero_points"], kind.bits, groups))

    def _packed_zeros(self, zeros: ir.Value, bits: int) -> ir.Value:
        missing = -self.blocks % (8 // bits)
        if missing:
            zeros = self.b.op("Pad", zeros, self.b.ints(0, 0, 0, missing), _zero(self.b))
        return self.b.reshape(pack_bits(self.b, zeros, bits), (-1,))

    def _correction(self, x: ir.Value) -> ir.Value:
        """What zero points that are numbers add: sums of each group of columns, times scale * (middle - zero point)."""
        b, kind = self.b, self.kind
        assert isinstance(kind, Integer) and kind.zero_point is ZeroPoint.FLOAT
        rows, groups = kind.scale_shape(self.packed.rows, self.packed.columns)
        middle = b.number(float(1 << (kind.bits - 1)))
        distance = b.op("Sub", middle, as_float(b, self.values, "zero_points"))
        offsets = b.op("Mul", as_float(b, self.values, "scales"), distance)
        if rows != self.packed.rows:
            offsets = b.op("Expand", offsets, b.ints(self.packed.rows, groups))
        group = self.packed.columns // groups
        apart = b.op("Concat", b.op("Shape", x, end=-1), b.ints(groups, group), axis=0)
        # a product, since ReduceSum of ONNX Runtime 1.31 gives no rows a wrong shape
        ones = b.constant(np.ones((group, 1), np.float32))
        sums = b.op("Squeeze", b.op("MatMul", b.op("Reshape", x, apart), ones), b.ints(-1))
        return b.op("MatMul", sums, b.op("Transpose", offsets, perm=[1, 0]))


def pack_bits(b: GraphBuilder, codes: ir.Value, bits: int) -> ir.Value:
    """u8 [N, K * bits / 8] of codes u8 [N, K], lowest bits first; K fills whole bytes."""
    each = 8 // bits
    if each == 1:
        return codes
    split = b.op("Reshape", codes, b.ints(0, -1, each))
    parts = b.ops("Split", split, b.ints(*[1] * each), outputs=each, axis=2)
    packed = parts[0]
    for place, part in enumerate(parts[1:], 1):
        shift = b.constant(np.array(place * bits, np.uint8))
        packed = b.op("BitwiseOr", packed, b.op("BitShift", part, shift, direction="LEFT"))
    return b.op("Squeeze", packed, b.ints(2))


def _halves(b: GraphBuilder, codes: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The lower and the upper four bits of bytes."""
    low = b.op("BitwiseAnd", codes, b.constant(np.array(15, np.uint8)))
    return low, b.op("BitShift", codes, b.constant(np.array(4, np.uint8)), direction="RIGHT")


def _code_bits(kind: object) -> int:
    if isinstance(kind, Integer):
        return kind.bits
    return kind.element.bits if isinstance(kind, BlockFloat) else 2


def _zero(b: GraphBuilder) -> ir.Value:
    return b.constant(np.array(0, np.uint8))
