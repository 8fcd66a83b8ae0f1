"""Products with packed matrices by `com.microsoft::MatMulNBits`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from moec.codegen.onnx.context import Context, NamedWeight
from moec.codegen.onnx.graph import MICROSOFT
from moec.codegen.onnx.packed.decode import as_float, block_scales, unpack_bits, unpack_trits
from moec.codegen.onnx.packed.kernel_form import KernelForm, accuracy_level
from moec.codegen.onnx.packed.matrix import PackedMatrix
from moec.dialects.quant import BlockFloat, Integer, Ternary, TritPacking, ZeroPoint
from moec.ir.types import DType
from moec.weights.expression import Reshape

OPERATOR = "MatMulNBits"


def kernel_product(
    context: Context, x: ir.Value, packed: PackedMatrix[NamedWeight], form: KernelForm, bias: ir.Value | None
) -> ir.Value:
    """x [..., columns] times the transpose of the matrix, plus bias [N]."""
    return _KernelMatrix(context, packed, form).product(x, bias)


class _KernelMatrix:
    """The inputs of the operator for one matrix."""

    def __init__(self, context: Context, packed: PackedMatrix[NamedWeight], form: KernelForm) -> None:
        self.context, self.b = context, context.builder
        self.packed, self.form, self.kind = packed, form, packed.format
        self.blocks = -(-packed.columns // form.block)

    def product(self, x: ir.Value, bias: ir.Value | None) -> ir.Value:
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
            accuracy_level=accuracy_level(self.context.options.activations),
        )

    # operands

    def _values(self, *names: str) -> PackedMatrix[ir.Value]:
        """The operands with these names, as they are stored."""
        some = tuple((name, self._stored(name, None)) for name in names if self.packed.get(name) is not None)
        packed = self.packed
        return PackedMatrix(packed.format, packed.rows, packed.columns, packed.number_type, some)

    def _stored(self, name: str, shape: tuple[int, ...] | None) -> ir.Value:
        """An operand in another shape; one that something else reads, too, is stored once."""
        weight = self.packed[name]
        again = str(weight.expression) in self.context.gathered or self.form.correction
        if shape is not None and not again:
            return self.context.stored_as_is(Reshape(weight.expression, shape), weight.name)
        value = self.context.stored_as_is(weight.expression, weight.name)
        return value if shape is None else self.b.reshape(value, shape)

    # codes

    def _is_direct(self) -> bool:
        """Whether codes and their order are the operator's."""
        whole = self.packed.columns % self.form.block == 0
        return whole and isinstance(self.kind, Integer) and self.kind.bits == self.form.bits and not self.form.in_planes

    def _codes(self) -> ir.Value:
        """u8 [N, blocks, bytes of a block]."""
        if self._is_direct():
            return self._stored("codes", (self.packed.rows, self.blocks, self.form.block * self.form.bits // 8))
        return self._by_block(pack_bits(self.context, self._rearranged(), self.form.bits), self.form.bits)

    def _planes(self) -> tuple[ir.Value, ir.Value]:
        """The lower and the upper halves of codes of 8 bits, packed."""
        low, high = _halves(self.context, self._rearranged())
        return tuple(self._by_block(pack_bits(self.context, part, 4), 4) for part in (low, high))  # type: ignore[return-value]

    def _by_block(self, packed: ir.Value, bits: int) -> ir.Value:
        return self.b.reshape(packed, (self.packed.rows, self.blocks, self.form.block * bits // 8))

    def _rearranged(self) -> ir.Value:
        """Codes of the operator, u8 [N, blocks * block], one in a byte."""
        b, kind, columns = self.b, self.kind, self.packed.columns
        codes = self._stored("codes", None)
        if isinstance(kind, Ternary) and kind.packing is TritPacking.FIVE_PER_BYTE:
            single = unpack_trits(b, codes, columns)
        else:
            single = unpack_bits(b, codes, _code_bits(kind), columns)
        table = self._table()
        if not np.array_equal(table, np.arange(len(table))):
            single = b.op("Gather", b.constant(table), b.cast(single, DType.I32), axis=0)
        missing = self.blocks * self.form.block - columns
        return b.op("Pad", single, b.ints(0, 0, 0, missing), _zero(self.context)) if missing else single

    def _table(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """The operator's code of each stored one."""
        if self.form.own_zeros:
            return np.arange(len(self.form.numbers), dtype=np.uint8)
        return (np.array(self.form.numbers) + self.form.zero).astype(np.uint8)

    # scales

    def _scales(self) -> ir.Value:
        """float32 [N * blocks]."""
        b, kind = self.b, self.kind
        rows, groups = kind.scale_shape(self.packed.rows, self.packed.columns)
        exact = self.packed.number_type is DType.F32 and self.form.multiplier == 1.0
        if exact and rows == self.packed.rows and self.form.repeats == 1:
            return self._stored("scales", (rows * groups,))
        if isinstance(kind, BlockFloat):
            values = block_scales(b, self._values("scales", "tensor_scale"), kind)
        else:
            values = as_float(b, self._values("scales"), "scales")
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
        kind = self.kind
        assert isinstance(kind, Integer)
        rows, nbytes = kind.zero_point_shape(self.packed.rows, self.packed.columns)
        if kind.bits == self.form.bits and rows == self.packed.rows and self.form.repeats == 1:
            return self._stored("zero_points", (rows * nbytes,))
        return self._packed_zeros(self._spread_zeros(kind), self.form.bits)

    def _zero_planes(self) -> tuple[ir.Value, ir.Value | None]:
        if not self.form.own_zeros:
            # 128 is 8 in the upper half, which is the operator's own middle, and 0 in the lower one
            size = self.packed.rows * -(-self.blocks // 2)
            return self.b.op("Expand", _zero(self.context), self.b.ints(size)), None
        assert isinstance(self.kind, Integer)
        low, high = _halves(self.context, self._spread_zeros(self.kind))
        return self._packed_zeros(low, 4), self._packed_zeros(high, 4)

    def _spread_zeros(self, kind: Integer) -> ir.Value:
        """Zero points u8 [N, blocks], one in a byte."""
        groups = kind.scale_shape(self.packed.rows, self.packed.columns)[1]
        return self._spread(unpack_bits(self.b, self._stored("zero_points", None), kind.bits, groups))

    def _packed_zeros(self, zeros: ir.Value, bits: int) -> ir.Value:
        missing = -self.blocks % (8 // bits)
        if missing:
            zeros = self.b.op("Pad", zeros, self.b.ints(0, 0, 0, missing), _zero(self.context))
        return self.b.reshape(pack_bits(self.context, zeros, bits), (-1,))

    def _correction(self, x: ir.Value) -> ir.Value:
        """What zero points that are numbers add: sums of each group of columns, times scale * (middle - zero point)."""
        b, kind = self.b, self.kind
        assert isinstance(kind, Integer) and kind.zero_point is ZeroPoint.FLOAT
        rows, groups = kind.scale_shape(self.packed.rows, self.packed.columns)
        middle = b.number(float(1 << (kind.bits - 1)))
        values = self._values("scales", "zero_points")
        distance = b.op("Sub", middle, as_float(b, values, "zero_points"))
        offsets = b.op("Mul", as_float(b, values, "scales"), distance)
        if rows != self.packed.rows:
            offsets = b.op("Expand", offsets, b.ints(self.packed.rows, groups))
        group = self.packed.columns // groups
        apart = b.op("Concat", b.op("Shape", x, end=-1), b.ints(groups, group), axis=0)
        # a product, since ReduceSum of ONNX Runtime 1.31 gives no rows a wrong shape
        ones = b.constant(np.ones((group, 1), np.float32))
        sums = b.op("Squeeze", b.op("MatMul", b.op("Reshape", x, apart), ones), b.ints(-1))
        return b.op("MatMul", sums, b.op("Transpose", offsets, perm=[1, 0]))


def pack_bits(context: Context, codes: ir.Value, bits: int) -> ir.Value:
    """u8 [N, K * bits / 8] of codes u8 [N, K], lowest bits first; K fills whole bytes."""
    b, each = context.builder, 8 // bits
    if each == 1:
        return codes
    split = b.op("Reshape", codes, b.ints(0, -1, each))
    parts = b.ops("Split", split, b.ints(*[1] * each), outputs=each, axis=2)
    packed = parts[0]
    for place, part in enumerate(parts[1:], 1):
        shift = b.constant(np.array(place * bits, np.uint8))
        packed = b.op("BitwiseOr", packed, b.op("BitShift", part, shift, direction="LEFT"))
    return b.op("Squeeze", packed, b.ints(2))


def _halves(context: Context, codes: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The lower and the upper four bits of bytes."""
    b = context.builder
    low = b.op("BitwiseAnd", codes, b.constant(np.array(15, np.uint8)))
    return low, b.op("BitShift", codes, b.constant(np.array(4, np.uint8)), direction="RIGHT")


def _code_bits(kind: object) -> int:
    if isinstance(kind, Integer):
        return kind.bits
    return kind.element.bits if isinstance(kind, BlockFloat) else 2


def _zero(context: Context) -> ir.Value:
    return context.builder.constant(np.array(0, np.uint8))
