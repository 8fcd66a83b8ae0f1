"""Fixed vectors that are added to a stream: rows of an embedding, positions, constants."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from moec.dialects.aten import AtenOp
from moec.experts.parts import erase_unused, new_weight, store_unrounded
from moec.ir import Operation
from moec.passes.matching import shape, tensor
from moec.passes.norm_folding.linear_maps import Source, add_operand, drop_unused, source_of
from moec.weights.context import WeightContext
from moec.weights.tensor_spec import TensorSpec

_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class FixedTerm:
    """Operand `position` of an operation: a weight [..., channels] that it looks up, repeats or adds."""

    op: AtenOp
    position: int
    source: Source

    @property
    def anchor(self) -> Operation:
        """The operation of the function that this is, or is part of."""
        return self.op if self.source.holder is None else self.source.holder[0]


def fixed_term(op: AtenOp, position: int) -> FixedTerm | None:
    """The operand as a term, None where it is no weight with a number for each channel of the result."""
    value = op.operands[position]
    source = source_of(value)
    fits = source is not None and not source.transposed and shape(value)[-1:] == shape(op.results[0])[-1:]
    return FixedTerm(op, position, source) if fits and source is not None else None


def term_tensor(term: FixedTerm, weights: WeightContext) -> torch.Tensor:
    """All rows of the term, float64."""
    return weights.load(weights.unrounded(term.source.weight.source)).double()


def rewrite_term(term: FixedTerm, weights: WeightContext, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replaces the term by `change` of its rows [..., channels], which leaves all but the last axis as it is."""
    op, source = term.op, term.source
    sizes = tensor(source.weight.value).static_shape
    dtype = tensor(source.weight.value).dtype
    expression = weights.unrounded(source.weight.source)
    channels = change(torch.zeros(sizes[-1:], dtype=torch.float64)).shape[0]

    def numbers() -> Iterator[torch.Tensor]:
        if len(sizes) == 1:
            yield change(weights.load(expression).double()).contiguous()
            return
        step = max(1, _CHUNK_BYTES // (8 * max(1, math.prod(sizes[1:]))))
        for start in range(0, sizes[0], step):
            rows = weights.load(expression, slice(start, min(start + step, sizes[0])))
            yield change(rows.double()).contiguous()

    spec = TensorSpec((*sizes[:-1], channels), torch.float64)
    stored = store_unrounded(weights, spec, numbers(), dtype)
    value = new_weight(term.anchor, source.weight.weight_name, stored, spec.shape, dtype)
    if source.holder is not None:
        value = add_operand(*source.holder, value, source.stacked)
    op.set_operand(term.position, value)
    if source.holder is not None:
        drop_unused(*source.holder)
    elif not source.weight.has_uses:
        erase_unused(source.weight)
