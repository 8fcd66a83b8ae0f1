"""The tables from operation to emission, and what most emissions need."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import onnx_ir as ir

from moec.codegen.onnx.context import Context, refuse, tensor_of
from moec.dialects.aten import AtenOp
from moec.dialects.builtin import ConstantOp, WeightOp
from moec.dialects.quant import DequantOp
from moec.ir.dimensions import DimExpr
from moec.ir.operation import Block, Operation
from moec.ir.types import DType, TensorType

Emission = Callable[[Context, AtenOp], "ir.Value | tuple[ir.Value, ...]"]

OpT = TypeVar("OpT", bound=Operation)
OpEmission = Callable[[Context, OpT], "ir.Value | tuple[ir.Value, ...]"]

EMISSIONS: dict[str, Emission] = {}
OP_EMISSIONS: dict[type[Operation], Callable[..., Any]] = {}


def emits(*names: str) -> Callable[[Emission], Emission]:
    """Registers an emission for overloads such as `add.Tensor`."""

    def register(emission: Emission) -> Emission:
        for name in names:
            EMISSIONS[f"aten.{name}"] = emission
        return emission

    return register


def emits_op(kind: type[OpT]) -> Callable[[OpEmission[OpT]], OpEmission[OpT]]:
    """Registers the emission of an operation class."""

    def register(emission: OpEmission[OpT]) -> OpEmission[OpT]:
        OP_EMISSIONS[kind] = emission
        return emission

    return register


def emit_operation(context: Context, op: Operation) -> tuple[ir.Value, ...]:
    """The ONNX values of the results; raises UnsupportedModelError for an operation without emission."""
    emission: Callable[..., Any] | None = OP_EMISSIONS.get(type(op))
    if isinstance(op, AtenOp):
        emission = context.taken_over.get(op) or EMISSIONS.get(op.name)
    if emission is None:
        raise refuse(op, "no emission is known for it")
    try:
        found: ir.Value | tuple[ir.Value, ...] = emission(context, op)
    except (KeyError, ValueError, AssertionError) as error:
        raise refuse(op, str(error) or type(error).__name__) from error
    return found if isinstance(found, tuple) else (found,)


def emit_block(context: Context, block: Block) -> tuple[ir.Value, ...]:
    """Emits the operations of a block in order and returns the values of its terminator."""
    for op in block:
        if op is block.last:
            break
        # weights and constants are emitted where they are first read
        if isinstance(op, WeightOp | ConstantOp) or op in context.skipped:
            continue
        if isinstance(op, DequantOp):
            context.late_values[op.weight] = partial(_first_value, context, op)
            continue
        with context.builder.scope_of(op.location.name):
            values = emit_operation(context, op)
        context.values.update(zip(op.results, values, strict=False))
    return tuple(context.value(value) for value in block.terminator.operands)


def _first_value(context: Context, op: Operation) -> ir.Value:
    return emit_operation(context, op)[0]


def result_type(op: AtenOp) -> TensorType:
    """The type of the first result."""
    return tensor_of(op.results[0])


def self_type(op: AtenOp) -> TensorType:
    """The type of the operand `self`."""
    return tensor_of(op.tensor("self"))


def cast_to(context: Context, value: ir.Value, source: DType, target: DType) -> ir.Value:
    """A cast, left out where it changes nothing."""
    return value if source is target else context.builder.cast(value, target)


def operand(context: Context, op: AtenOp, name: str, dtype: DType) -> ir.Value:
    """A tensor or number argument as a tensor of `dtype`."""
    tensors = op.tensors(name)
    if tensors:
        return cast_to(context, context.value(tensors[0]), tensor_of(tensors[0]).dtype, dtype)
    number = op.argument(name)
    if not isinstance(number, bool | int | float | DimExpr):
        raise refuse(op, f"{name} is {number!r}")
    return context.scalar(number, dtype)


def promoted(op: AtenOp, *names: str) -> DType:
    """The element type in which tensors and numbers of a comparison or of a selection meet."""
    found: DType | None = None
    for name in names:
        for value in op.tensors(name):
            dtype = tensor_of(value).dtype
            found = dtype if found is None else higher(found, dtype)
    for name in names:
        if not op.tensors(name):
            number = op.argument(name)
            kind = DType.I1 if isinstance(number, bool) else DType.F32 if isinstance(number, float) else DType.I64
            # a number does not widen a tensor of its own kind
            if found is None or _kind(kind) > _kind(found):
                found = kind
    assert found is not None
    return found


def higher(left: DType, right: DType) -> DType:
    """The wider of two element types, as torch promotes tensors."""
    return max(left, right, key=lambda dtype: (_kind(dtype), dtype.bytes))


def _kind(dtype: DType) -> int:
    return 0 if dtype is DType.I1 else 2 if dtype.is_float else 1


def normalized_axis(axis: int, rank: int) -> int:
    """The axis counted from the front."""
    return axis + rank if axis < 0 else axis


def axes_of(op: AtenOp, name: str, rank: int) -> tuple[int, ...]:
    """A `dim` argument as non-negative axes; all of them where it is absent or empty."""
    given = op.argument(name)
    axes = (given,) if isinstance(given, int) else tuple(given or ())
    return tuple(normalized_axis(axis, rank) for axis in axes) if axes else tuple(range(rank))
