"""Matrices whose bands are packed in unlike formats, as one product for each band.

The IR joins the bands to one matrix and multiplies with that. Operators of packed weights take one format each, and
rows times a joined matrix are the joined products (bands of outputs) or their sum (bands of inputs).
"""

from __future__ import annotations

from dataclasses import replace

from moec.dialects import aten
from moec.dialects.aten import AtenOp
from moec.dialects.builtin import ModuleOp
from moec.dialects.nn import TOKENS
from moec.dialects.quant import DequantOp
from moec.ir import DType, Operation, TensorType, Value
from moec.module import Module


def with_products_of_bands(module: Module) -> Module:
    """The module itself where no matrix has bands, else a copy of it that multiplies with each band."""
    if not any(_bands(op) for op in module.op.walk()):
        return module
    clone = module.op.clone()
    assert isinstance(clone, ModuleOp)
    copy = replace(module, op=clone)
    for op in [op for op in copy.op.walk() if _bands(op)]:
        assert isinstance(op, AtenOp)
        for user in op.result.users:
            assert isinstance(user, AtenOp)
            user.replace_with([_product(user, _bands(op), _axis(op))])
        op.erase()
    return copy


def _bands(op: Operation) -> tuple[Value, ...]:
    """The packed matrices that a `cat` joins, if all its readers are products with them; empty for other operations."""
    if not isinstance(op, AtenOp) or op.name != "aten.cat.default":
        return ()
    parts = op.tensors("tensors")
    if not all(isinstance(part.defining_op, DequantOp) for part in parts):
        return ()
    readers = op.result.users
    if not all(isinstance(user, AtenOp) and user.name == "aten.linear.default" for user in readers):
        return ()
    return parts if all(user.tensor("weight") is op.result for user in readers if isinstance(user, AtenOp)) else ()


def _axis(op: AtenOp) -> int:
    axis = op.argument("dim")
    assert isinstance(axis, int)
    return axis % 2


def _product(op: AtenOp, bands: tuple[Value, ...], axis: int) -> Value:
    rows, bias = op.tensor("input"), next(iter(op.tensors("bias")), None)
    found: list[Value] = []
    start = 0
    for number, band in enumerate(bands):
        size = _shape(band)[axis]
        if axis == 0:
            part = None if bias is None else _slice(op, bias, 0, start, start + size)
            found.append(_linear(op, rows, band, part))
        else:
            # the bias is added once
            found.append(_linear(op, _slice(op, rows, 1, start, start + size), band, None if number else bias))
        start += size
    if axis == 0:
        return _before(op, aten.build("cat.default", {"tensors": tuple(found)}, (op.result.type,), dim=1))
    total = found[0]
    for more in found[1:]:
        total = _before(op, aten.build("add.Tensor", {"self": total, "other": more}, (op.result.type,)))
    return total


def _linear(anchor: Operation, rows: Value, weight: Value, bias: Value | None) -> Value:
    tensors: dict[str, Value | tuple[Value, ...]] = {"input": rows, "weight": weight}
    if bias is not None:
        tensors["bias"] = bias
    kind = TensorType((TOKENS, _shape(weight)[0]), DType.F32)
    return _before(anchor, aten.build("linear.default", tensors, (kind,)))


def _slice(anchor: Operation, value: Value, dim: int, start: int, stop: int) -> Value:
    assert isinstance(value.type, TensorType)
    shape = value.type.shape
    kind = TensorType((*shape[:dim], stop - start, *shape[dim + 1 :]), value.type.dtype)
    op = aten.build("slice.Tensor", {"self": value}, (kind,), dim=dim, start=start, end=stop, step=1)
    return _before(anchor, op)


def _before(anchor: Operation, op: AtenOp) -> Value:
    op.location = anchor.location
    op.insert_before(anchor)
    return op.result


def _shape(matrix: Value) -> tuple[int, int]:
    assert isinstance(matrix.type, TensorType)
    outputs, inputs = matrix.type.shape
    assert isinstance(outputs, int) and isinstance(inputs, int)
    return outputs, inputs
