"""Bodies of classes of experts in their canonical form, and which of an expert's tensors are the operands.

A body takes the rows and one tensor per operand in the order of `operands_of`; shared ones come last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import overload

import torch

from moec.dialects import aten
from moec.dialects.moe import YieldOp
from moec.dialects.nn import TOKENS
from moec.dialects.quant import DequantOp
from moec.experts.expert import (
    Affine,
    Banded,
    Constant,
    Dense,
    Expert,
    FeedForward,
    Matrix,
    Offset,
    PartlyLowRank,
    Projection,
    Quantized,
)
from moec.ir import Block, DType, Region, TensorType, Value
from moec.quantization.packed import OPERANDS
from moec.reference.element_types import ir_type


@dataclass(frozen=True)
class Operand:
    """A tensor that the body reads. `name` says what it is: `gate`, `down.left`, `up.bias`, `up.codes`."""

    name: str
    tensor: torch.Tensor
    shared: bool = False
    packed: bool = False

    @property
    def dtype(self) -> DType:
        """The element type that it is stored in: its own where it is a part of a packed matrix, else float32."""
        return ir_type(self.tensor.dtype) if self.packed else DType.F32

    @property
    def itemsize(self) -> int:
        """Bytes of an element as it is stored."""
        return self.tensor.dtype.itemsize if self.packed else torch.float32.itemsize


def operands_of(expert: Expert) -> tuple[Operand, ...]:
    """The tensors of an expert in the order in which its body takes them."""
    if isinstance(expert, Constant):
        return (Operand("value", expert.value),)
    if isinstance(expert, Affine):
        return (Operand("right", expert.right), Operand("left", expert.left), Operand("bias", expert.bias))
    found = [operand for name, projection in _projections(expert) for operand in _operands(name, projection)]
    return (*[item for item in found if not item.shared], *[item for item in found if item.shared])


def body_key(expert: Expert) -> tuple[object, ...]:
    """Comparable values that are equal for experts with the same body and the same sizes of all operands."""
    operands = tuple((item.name, tuple(item.tensor.shape), item.dtype, item.shared) for item in operands_of(expert))
    if not isinstance(expert, FeedForward):
        return (type(expert).__name__, operands)
    return (type(expert).__name__, expert.activation, _formats(expert), operands)


def _formats(expert: FeedForward) -> tuple[object, ...]:
    """What operands do not say of packed matrices."""
    matrices = [projection.matrix for _, projection in _projections(expert)]
    return tuple(tuple((part.packed.format, part.packed.columns) for part in _packed_parts(item)) for item in matrices)


def _packed_parts(matrix: Matrix) -> tuple[Quantized, ...]:
    """The packed matrices that a matrix consists of."""
    if isinstance(matrix, Banded):
        return matrix.parts
    if isinstance(matrix, Offset):
        return (*_packed_parts(matrix.base), matrix.delta)
    return (matrix,) if isinstance(matrix, Quantized) else ()


def build_body(expert: Expert, hidden_size: int) -> Region:
    """The region that computes experts of this kind and these sizes on [tokens, hidden_size]."""
    operands = operands_of(expert)
    kinds = [TensorType(tuple(item.tensor.shape), item.dtype) for item in operands]
    block = Block([_f32(TOKENS, hidden_size), *kinds])
    rows = block.arguments[0]
    given = {item.name: argument for item, argument in zip(operands, block.arguments[1:], strict=True)}
    if isinstance(expert, Constant):
        kind = _f32(TOKENS, hidden_size)
        spread = aten.build("expand.default", {"self": given["value"]}, (kind,), size=kind.shape)
        block.append(spread)
        result: Value = spread.result
    elif isinstance(expert, Affine):
        inner = _linear(block, rows, given["right"], None)
        result = _linear(block, inner, given["left"], given["bias"])
    else:
        gate = None if expert.gate is None else _project(block, rows, "gate", expert.gate, given)
        up = _project(block, rows, "up", expert.up, given)
        hidden = expert.activation.emit(block, gate, up)
        result = _project(block, hidden, "down", expert.down, given)
    block.append(YieldOp([result], result_types=[]))
    return Region(block)


def _projections(expert: FeedForward) -> list[tuple[str, Projection]]:
    found = [("up", expert.up), ("down", expert.down)]
    return found if expert.gate is None else [("gate", expert.gate), *found]


def _operands(name: str, projection: Projection) -> list[Operand]:
    found = _matrix_operands(name, projection.matrix)
    if projection.bias is not None:
        found.append(Operand(f"{name}.bias", projection.bias))
    return found


def _matrix_operands(name: str, matrix: Matrix) -> list[Operand]:
    if isinstance(matrix, Dense):
        return [Operand(name, matrix.weight)]
    if isinstance(matrix, PartlyLowRank):
        # the name says which axis the parts share
        return [Operand(f"{name}.{_PARTS[matrix.axis]}", matrix.whole), *_matrix_operands(name, matrix.rest)]
    if isinstance(matrix, Banded):
        numbered = enumerate(matrix.parts)
        return [item for number, part in numbered for item in _matrix_operands(f"{name}.{number}", part)]
    if isinstance(matrix, Offset):
        base = [replace(item, shared=True) for item in _matrix_operands(f"{name}.base", matrix.base)]
        return [*_matrix_operands(f"{name}.delta", matrix.delta), *base]
    if isinstance(matrix, Quantized):
        return [
            Operand(f"{name}.{part}", tensor, part == "table" and matrix.table_is_shared, packed=True)
            for part, tensor in matrix.packed.tensors().items()
        ]
    found = [
        Operand(f"{name}.right", matrix.right, matrix.right_is_shared),
        Operand(f"{name}.left", matrix.left, matrix.left_is_shared),
    ]
    if matrix.base is not None:
        found.append(Operand(f"{name}.base", matrix.base, shared=True))
    return found


_PARTS = ("rows", "columns")


def _project(block: Block, rows: Value, name: str, projection: Projection, given: Mapping[str, Value]) -> Value:
    bias = given.get(f"{name}.bias")
    matrix = projection.matrix
    if isinstance(matrix, Dense):
        return _linear(block, rows, given[name], bias)
    if isinstance(matrix, PartlyLowRank):
        return _project_parts(block, rows, name, matrix, bias, given)
    if isinstance(matrix, Quantized):
        return _linear(block, rows, _unpack(block, name, matrix, given), bias)
    if isinstance(matrix, Offset):
        base = _project(block, rows, f"{name}.base", Projection(matrix.base), given)
        more = _linear(block, rows, _unpack(block, f"{name}.delta", matrix.delta, given), bias)
        return _add(block, base, more)
    if isinstance(matrix, Banded):
        parts = tuple(_unpack(block, f"{name}.{number}", part, given) for number, part in enumerate(matrix.parts))
        joined = aten.build("cat.default", {"tensors": parts}, (_f32(*matrix.shape),), dim=matrix.axis)
        block.append(joined)
        return _linear(block, rows, joined.result, bias)
    result = _linear(block, _linear(block, rows, given[f"{name}.right"], None), given[f"{name}.left"], bias)
    if matrix.base is None:
        return result
    return _add(block, _linear(block, rows, given[f"{name}.base"], None), result)


def _project_parts(
    block: Block, rows: Value, name: str, matrix: PartlyLowRank, bias: Value | None, given: Mapping[str, Value]
) -> Value:
    whole, right, left = (given[f"{name}.{part}"] for part in (_PARTS[matrix.axis], "right", "left"))
    outputs, inputs = matrix.shape
    if matrix.axis == 0:
        kept = len(matrix.whole)
        first = _linear(block, rows, whole, _slice(block, bias, 0, 0, kept))
        second = _linear(block, _linear(block, rows, right, None), left, _slice(block, bias, 0, kept, outputs))
        joined = aten.build("cat.default", {"tensors": (first, second)}, (_f32(TOKENS, outputs),), dim=1)
        block.append(joined)
        return joined.result
    kept = matrix.whole.shape[1]
    first = _linear(block, _slice(block, rows, 1, 0, kept), whole, None)
    inner = _linear(block, _slice(block, rows, 1, kept, inputs), right, None)
    return _add(block, first, _linear(block, inner, left, bias))


def _unpack(block: Block, name: str, matrix: Quantized, given: Mapping[str, Value]) -> Value:
    kind = matrix.packed
    parts = [given.get(f"{name}.{part}") for part in OPERANDS]
    weight = DequantOp(*parts, format=kind.format, columns=kind.columns)
    block.append(weight)
    return weight.weight


def _add(block: Block, first: Value, second: Value) -> Value:
    total = aten.build("add.Tensor", {"self": first, "other": second}, (first.type,))
    block.append(total)
    return total.result


@overload
def _slice(block: Block, value: Value, dim: int, start: int, stop: int) -> Value: ...
@overload
def _slice(block: Block, value: Value | None, dim: int, start: int, stop: int) -> Value | None: ...
def _slice(block: Block, value: Value | None, dim: int, start: int, stop: int) -> Value | None:
    """Elements along an axis; None of None."""
    if value is None:
        return None
    kind = value.type
    assert isinstance(kind, TensorType)
    shape = (*kind.shape[:dim], stop - start, *kind.shape[dim + 1 :])
    op = aten.build("slice.Tensor", {"self": value}, (_f32(*shape),), dim=dim, start=start, end=stop, step=1)
    block.append(op)
    return op.result


def _linear(block: Block, rows: Value, weight: Value, bias: Value | None) -> Value:
    assert isinstance(weight.type, TensorType)
    tensors: dict[str, Value | tuple[Value, ...]] = {"input": rows, "weight": weight}
    if bias is not None:
        tensors["bias"] = bias
    op = aten.build("linear.default", tensors, (_f32(TOKENS, weight.type.shape[0]),))
    block.append(op)
    return op.result


def _f32(*shape: object) -> TensorType:
    return TensorType(tuple(shape), DType.F32)  # type: ignore[arg-type]
