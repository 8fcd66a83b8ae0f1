"""What lies between the projections of an expert, as a block of its own."""

from __future__ import annotations

from collections.abc import Sequence

from moec.dialects.builtin import ConstantOp
from moec.dialects.moe import YieldOp
from moec.dialects.nn import TOKENS
from moec.experts.expert import WIDTH, Activation, operation_key
from moec.ir import Block, DimExpr, Operation, TensorType, Value

# a value that goes into one of these is the gate of a gated expert
_NONLINEAR = frozenset(
    f"aten.{name}.default"
    for name in (
        "silu", "gelu", "sigmoid", "relu", "tanh", "softplus", "elu", "leaky_relu", "hardswish", "hardsigmoid", "mish",
        "square", "exp", "selu", "celu", "erf",
    )
) | {"aten.pow.Tensor_Scalar"}  # fmt: skip
_LAYOUT = "operand_layout"


def read_activation(
    hidden: Value, ops: Sequence[Operation], projections: Sequence[Value]
) -> tuple[Activation, list[Value]]:
    """The function that `ops`, in their order, compute of one or two projections, and these, the gate first.

    Raises ValueError with the reason where it is not elementwise or depends on sizes.
    """
    width = columns_of(hidden)
    leaves = list(projections)
    if any(columns_of(leaf) != width for leaf in leaves):
        raise ValueError("its activation changes the number of columns")
    if len(leaves) == 2 and _is_gate(leaves[1]) and not _is_gate(leaves[0]):
        leaves.reverse()
    block = Block([TensorType((TOKENS, WIDTH), _tensor(hidden).dtype)] * len(leaves))
    mapping: dict[Value, Value] = dict(zip(leaves, block.arguments, strict=True))
    names: dict[Value, int] = {leaf: number for number, leaf in enumerate(leaves)}
    key: list[object] = []
    for op in ops:
        if any(isinstance(value, tuple | DimExpr) for name, value in op.attributes.items() if name != _LAYOUT):
            raise ValueError(f"{op.name} in its activation names sizes")
        key.append(operation_key(op, names))
        copy = op.clone(mapping)
        for result in copy.results:
            kind = _tensor(result)
            if kind.shape == (TOKENS, width):
                result.type = TensorType((TOKENS, WIDTH), kind.dtype)
            elif not isinstance(op, ConstantOp) or kind.rank:
                raise ValueError(f"{op.name} in its activation is not elementwise")
        block.append(copy)
    block.append(YieldOp([mapping[hidden]], result_types=[]))
    return Activation(len(leaves) == 2, (*key, names[hidden]), block), leaves


def columns_of(value: Value) -> object:
    """The last size of a tensor."""
    return _tensor(value).shape[-1]


def _is_gate(leaf: Value) -> bool:
    """Whether a value meets a nonlinear function before it meets another value."""
    frontier = [leaf]
    while frontier:
        for user in frontier.pop().users:
            if user.name in _NONLINEAR:
                return True
            if sum(not isinstance(value.defining_op, ConstantOp) for value in user.operands) == 1:
                frontier.extend(user.results)
    return False


def _tensor(value: Value) -> TensorType:
    assert isinstance(value.type, TensorType)
    return value.type
