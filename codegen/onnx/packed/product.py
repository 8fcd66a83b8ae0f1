"""Products and rows of packed weights, by the operator that takes them packed or from decoded numbers."""

from __future__ import annotations

import onnx_ir as ir

from moec.codegen.onnx.context import Context, NamedWeight
from moec.codegen.onnx.graph import MICROSOFT
from moec.codegen.onnx.packed.decode import decode
from moec.codegen.onnx.packed.kernel import kernel_products, store_matrix
from moec.codegen.onnx.packed.kernel_form import KernelForm, kernel_form
from moec.codegen.onnx.packed.matrix import PackedMatrix, packed_matrix
from moec.dialects.quant import BlockFloat, DequantOp, Format, Integer, TernaryDictionary, ZeroPoint
from moec.ir.operation import Value
from moec.ir.types import DType

_END = (1 << 63) - 1
_GATHERED_BITS = (4, 8)


def usable_form(context: Context, packed: Format, columns: int) -> KernelForm | None:
    """How the target multiplies rows of `columns` packed weights without decoding them; None where it cannot."""
    if not context.options.target.profile.contrib:
        return None
    return kernel_form(packed, columns, context.options.activations)


def named_packed(context: Context, value: Value) -> PackedMatrix[NamedWeight] | None:
    """The packed matrix that a value of the function is, where its operands are weights of the model."""
    op = context.aliases.get(value, value).defining_op
    if not isinstance(op, DequantOp):
        return None
    packed = packed_matrix(op)
    named = {name: context.named_weight(operand) for name, operand in packed.operands}
    found = {name: weight for name, weight in named.items() if weight is not None}
    return packed.map(lambda name, _: found[name]) if len(found) == len(named) else None


def packed_product(context: Context, x: ir.Value, packed: PackedMatrix[NamedWeight], bias: ir.Value | None) -> ir.Value:
    """x [..., columns] times the transpose of the matrix, plus bias [N]."""
    form = usable_form(context, packed.format, packed.columns)
    if form is not None:
        return kernel_products(context, [x], [store_matrix(context, packed, form)], form, [bias])[0]
    b = context.builder
    product = b.op("MatMul", x, b.op("Transpose", decoded(context, packed), perm=[1, 0]))
    return product if bias is None else b.op("Add", product, bias)


def decoded(context: Context, packed: PackedMatrix[NamedWeight]) -> ir.Value:
    """The matrix in float32 [N, columns], computed whenever the model runs."""
    return decode(context.builder, packed.map(lambda name, weight: _late(context, packed.format, name, weight)))


def packed_rows(context: Context, packed: PackedMatrix[NamedWeight], ids: ir.Value) -> ir.Value:
    """Rows float32 [..., columns] of the matrix at `ids` [...]; only these are decoded."""
    b = context.builder
    if isinstance(packed.format, TernaryDictionary):
        return b.op("Gather", decoded(context, packed), ids, axis=0)
    if context.options.target.profile.contrib and _gathers_packed(packed):
        return _gathered(context, packed, ids)
    flat = b.reshape(ids, (-1,))

    def some(name: str, weight: NamedWeight) -> ir.Value:
        value = context.stored_as_is(weight.expression, weight.name)
        by_row = name != "table" and context.weights.shape_dtype(weight.expression)[0][0] == packed.rows
        return b.op("Gather", value, flat, axis=0) if by_row and name != "tensor_scale" else value

    rows = decode(b, packed.map(some))
    shape = b.op("Concat", b.op("Shape", ids), b.ints(packed.columns), axis=0)
    return b.op("Reshape", rows, shape)


def _gathers_packed(packed: PackedMatrix[NamedWeight]) -> bool:
    """Whether `com.microsoft::GatherBlockQuantized` reads the matrix as it is stored."""
    kind = packed.format
    if not isinstance(kind, Integer) or kind.bits not in _GATHERED_BITS or packed.number_type is not DType.F32:
        return False
    rows, groups = kind.scale_shape(packed.rows, packed.columns)
    block = packed.columns // groups
    # its blocks are powers of two from 16 on, and zero points of a row fill whole bytes
    fits = block >= 16 and block & (block - 1) == 0 and rows == packed.rows
    return fits and (kind.zero_point is ZeroPoint.MIDDLE or (kind.zero_point is ZeroPoint.INTEGER and groups % 2 == 0))


def _gathered(context: Context, packed: PackedMatrix[NamedWeight], ids: ir.Value) -> ir.Value:
    kind = packed.format
    assert isinstance(kind, Integer)
    names = ("codes", "scales") if kind.zero_point is ZeroPoint.MIDDLE else ("codes", "scales", "zero_points")
    stored = [context.stored_as_is(packed[name].expression, packed[name].name) for name in names]
    return context.builder.op(
        "GatherBlockQuantized",
        stored[0],
        ids,
        *stored[1:],
        domain=MICROSOFT,
        bits=kind.bits,
        block_size=packed.columns // kind.scale_shape(packed.rows, packed.columns)[1],
        gather_axis=0,
        quantize_axis=1,
    )


def _late(context: Context, packed: Format, name: str, weight: NamedWeight) -> ir.Value:
    """An operand that a runtime does not know when it loads the file, where it would unpack it then."""
    b = context.builder
    value = context.stored_as_is(weight.expression, weight.name)
    unpacked = name in ("codes", "zero_points", "offsets") or (name == "scales" and isinstance(packed, BlockFloat))
    if not unpacked:
        return value
    return b.op("Slice", value, context.run_time_zero(), b.ints(_END), b.ints(0))
