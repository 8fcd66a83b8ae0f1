"""ATen operations and constants. Overloads are called through torch's own schemas, so that none needs an entry here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moec.dialects.aten import AtenOp
from moec.dialects.builtin import ConstantOp
from moec.errors import UnsupportedModelError
from moec.ir import DimExpr, DType, TensorType, Value
from moec.reference.element_types import stored_type
from moec.reference.frame import Frame
from moec.reference.kernels import Kernel, prepares

# Where and how a tensor lies in memory is not part of the IR.
_LAYOUT_ARGUMENTS = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking"})
# These refuse or misread a tensor that does not lie densely in row-major order, as every tensor of the IR does.
_NEED_DENSE_INPUT = frozenset(
    {"aten.view.default", "aten.view.dtype", "aten._unsafe_view.default", "aten.view_as_complex.default",
     "aten.as_strided.default"}
)  # fmt: skip

_Argument = Callable[[Frame], Any]


@prepares(AtenOp)
def prepare_aten(op: AtenOp) -> Kernel:
    """Calls the overload of torch that the operation is named after."""
    overload = _overload(op)
    positional: list[_Argument] = []
    keywords: dict[str, _Argument] = {}
    gap = False
    for argument in overload._schema.arguments:
        found = None if argument.name in _LAYOUT_ARGUMENTS else _argument(op, argument)
        if found is None:
            gap = True
        elif gap or argument.kwarg_only:
            keywords[argument.name] = found
        else:
            positional.append(found)
    single = len(overload._schema.returns) == 1 and str(overload._schema.returns[0].type) == "Tensor"

    def compute(frame: Frame) -> Sequence[torch.Tensor]:
        given = [argument(frame) for argument in positional]
        result: Any = overload(*given, **{name: argument(frame) for name, argument in keywords.items()})
        return (result,) if single else tuple(result)

    return compute


def _overload(op: AtenOp) -> torch._ops.OpOverload:
    name, _, overload = op.name.removeprefix("aten.").partition(".")
    packet = getattr(torch.ops.aten, name, None)
    found = getattr(packet, overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise UnsupportedModelError(f"this torch has no operation {op.name}", where=str(op.location))
    return found


def _argument(op: AtenOp, argument: torch._C.Argument) -> _Argument | None:
    """How to make one argument of the call; None to leave it at its default."""
    name = argument.name
    positions = op.positioned_tensors(name)
    if positions:
        values = [positions.get(position) for position in range(max(positions) + 1)]
        return lambda frame: [frame.optional(value) for value in values]
    tensors = op.tensors(name)
    kind = str(argument.type)
    if kind.startswith(("List[Tensor", "List[Optional[Tensor")):
        return lambda frame: [frame.tensor(value) for value in tensors]
    if tensors:
        return _dense_tensor(tensors[0]) if op.name in _NEED_DENSE_INPUT else _one_tensor(tensors[0])
    if name in op.attributes:
        return _attribute(op.attributes[name])
    if name == "dtype" and not op.operand_count:
        # A tensor made from nothing has the type that the IR says, not the default of the run.
        result = op.results[0].type
        assert isinstance(result, TensorType)
        return _attribute(result.dtype)
    return None


def _one_tensor(value: Value) -> _Argument:
    return lambda frame: frame.tensor(value)


def _dense_tensor(value: Value) -> _Argument:
    return lambda frame: frame.tensor(value).contiguous()


def _attribute(value: Any) -> _Argument:
    if isinstance(value, DimExpr):
        return lambda frame: frame.size(value)
    if isinstance(value, DType):
        return lambda frame: frame.settings.types[value]
    if isinstance(value, tuple):
        items = [_attribute(item) for item in value]
        return lambda frame: [item(frame) for item in items]
    return lambda frame: value


@prepares(ConstantOp)
def prepare_constant(op: ConstantOp) -> Kernel:
    """The constant's elements, in the run's type."""
    kind = op.value.type
    assert isinstance(kind, TensorType)
    shape, dtype = kind.static_shape, stored_type(kind.dtype)
    data = op.data.data
    stored = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    tensor = stored.reshape(shape)
    element = kind.dtype
    return lambda frame: (tensor.to(frame.settings.types[element]),)
