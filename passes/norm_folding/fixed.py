"""Numbers that depend on no token: weights, constants and what is computed from them alone."""

from __future__ import annotations

import torch

from moec.dialects.aten import AtenOp
from moec.dialects.builtin import ConstantOp, WeightOp
from moec.dialects.moe import YieldOp
from moec.ir import Block, DType, Operation, Value
from moec.passes.matching import shape, tensor
from moec.reference.element_types import ElementTypes
from moec.reference.frame import ExpertsLowering, Frame, RunSettings
from moec.reference.plan import plan_block
from moec.reference.weight_loader import WeightLoader
from moec.weights.context import WeightContext

_DEPTH = 8


def is_fixed(value: Value, depth: int = _DEPTH) -> bool:
    """Whether `value` is a weight, a constant or a few aten operations on such ones."""
    op = value.defining_op
    if isinstance(op, WeightOp | ConstantOp):
        return True
    if not isinstance(op, AtenOp) or depth == 0 or not all(isinstance(size, int) for size in shape(value)):
        return False
    return all(is_fixed(operand, depth - 1) for operand in op.operands)


def fixed_tensor(value: Value, weights: WeightContext) -> torch.Tensor:
    """The numbers of a fixed value, float64 where it is floating-point, without rounding to float32 on the way."""
    types = ElementTypes(torch.float64)
    block, mapping = Block(), dict[Value, Value]()
    block.append(YieldOp([_copied(value, block, mapping)], result_types=[]))
    settings = RunSettings(types, WeightLoader(weights, types), ExpertsLowering.GROUPED)
    with torch.no_grad():
        (found,) = plan_block(block).run(Frame(settings, {}, {}))
    return found.to(torch.float64) if tensor(value).dtype is DType.BF16 or tensor(value).dtype is DType.F16 else found


def _copied(value: Value, block: Block, mapping: dict[Value, Value]) -> Value:
    if value not in mapping:
        op = value.defining_op
        assert op is not None
        for operand in op.operands:
            _copied(operand, block, mapping)
        copy: Operation = op.clone(mapping)
        block.append(copy)
    return mapping[value]
