"""What several models give: the same block of each, and the average of a weight over all."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from moec.dialects.builtin import WeightOp
from moec.errors import UsageError
from moec.experts import FeedForward, UnreadableExpertError
from moec.experts.dense import DenseLayer
from moec.experts.reading import load_body
from moec.frontend.other_sources import OtherSource
from moec.ir import Operation
from moec.weights.context import WeightContext
from moec.weights.expression import Cast, Expression
from moec.weights.expression_parser import parse_expression
from moec.weights.tensor_spec import TensorSpec


def load_dense_of(layer: DenseLayer, weights: WeightContext, source: OtherSource) -> FeedForward:
    """The block of another model that is in the place of `layer`, float32.

    Raises UnreadableExpertError as `load_dense`, and UsageError where a pass computed a weight of it.
    """
    operands = []
    for value in layer.op.weights:
        old = value.defining_op
        if not isinstance(old, WeightOp):
            raise UnreadableExpertError("a weight of the block is computed", where=layer.name)
        new = WeightOp(
            result_types=[value.type],
            weight_name=old.weight_name,
            source=str(source.expression(parse_expression(old.source))),
        )
        operands.append((new.value, None))
    found = load_body(layer.name, layer.op.regions[0].block, operands, weights, dtype=torch.float32)
    if not isinstance(found, FeedForward):
        raise UnreadableExpertError("this block has no hidden activations", where=layer.name)
    return found


def average_weights(
    root: Operation, weights: WeightContext, sources: Sequence[OtherSource | None], leave: Collection[Operation]
) -> int:
    """Gives every weight but those in `leave` the mean over sources (None: the first model); returns how many changed.

    Means are taken in float32 and rounded once, to the element type of the sources. What is equal in all stays the
    tensor of the first. Raises UsageError where a pass computed a weight, or where there is no store.
    """
    known: dict[str, str] = {}
    changed = 0
    for op in root.walk():
        if not isinstance(op, WeightOp) or op in leave:
            continue
        if op.source not in known:
            expression = parse_expression(op.source)
            parts = [expression if source is None else source.expression(expression) for source in sources]
            known[op.source] = str(average(weights, parts))
        changed += known[op.source] != op.source
        op.source = known[op.source]
    return changed


def average(weights: WeightContext, parts: Sequence[Expression]) -> Expression:
    """The mean of equally shaped tensors, a part of them in memory at a time; the first one where all are equal."""
    if len({weights.digest(part) for part in parts}) == 1:
        return parts[0]
    casts = [part for part in parts if isinstance(part, Cast)]
    if len(casts) == len(parts):
        return Cast(average(weights, [cast.operand for cast in casts]), casts[0].dtype)
    if weights.store is None:
        raise UsageError("averages need a store for them", hint="give the folder of a store")
    shape, dtype = weights.shape_dtype(parts[0])
    if not dtype.is_floating_point:
        raise UsageError("weights that are no floating-point numbers have no average", where=str(parts[0])[:300])

    def pieces() -> Iterator[torch.Tensor]:
        for tensors in zip(*[weights.chunks(part) for part in parts], strict=True):
            total = tensors[0].float()
            for tensor in tensors[1:]:
                total = total + tensor.float()
            yield (total / len(tensors)).to(dtype)

    return weights.store.put_parts(TensorSpec(shape, dtype), pieces())
