"""Layers that read the same experts: their form must be one in which these are stored once.

The fused operator takes all experts of a layer as one weight, in an order of its own, so an expert in two such weights
would be stored twice. The lean form names each expert's matrices, which layers then share, if all of them divide gate
and up or none does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moec.codegen.onnx.context import Context
from moec.dialects.moe import ExpertsOp
from moec.ir.operation import Operation
from moec.weights.expression import Expression, Slice
from moec.weights.rows import joined_parts, row_of, simplified


@dataclass(frozen=True)
class CommonExperts:
    """What a layer has in common with itself or other layers: experts that are to be stored once.

    `most_experts` is the number of experts of the largest of the layers.
    """

    most_experts: int


def find_common(context: Context, layers: Sequence[ExpertsOp]) -> dict[Operation, CommonExperts]:
    """The layers whose experts occur again, in another layer or in their own."""
    readers: dict[Expression, list[ExpertsOp]] = {}
    for op in layers:
        for tensor in _tensors(context, op):
            readers.setdefault(tensor, []).append(op)
    for tensor, found in list(readers.items()):
        if isinstance(tensor, Slice) and tensor.operand in readers:
            readers[tensor.operand] += found
    groups: dict[ExpertsOp, set[ExpertsOp]] = {}
    for found in readers.values():
        if len(found) > 1:
            group = set(found).union(*[groups.get(op, set()) for op in found])
            groups.update(dict.fromkeys(group, group))
    return {op: CommonExperts(max(other.expert_count for other in group)) for op, group in groups.items()}


def _tensors(context: Context, op: ExpertsOp) -> Iterator[Expression]:
    """What the weights of each expert are joined of."""
    for group, values, _ in op.class_operands():
        for value in values[: group.stacks]:
            named = context.named_weight(value)
            if named is not None:
                for row in range(len(group.experts)):
                    yield from joined_parts(simplified(row_of(named.expression, row, context.weights), context.weights))
