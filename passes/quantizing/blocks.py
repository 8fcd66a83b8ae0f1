"""The matrices of a feed-forward block, one after the other, as packed ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from moec.experts import Dense, Expert, FeedForward, Matrix, Quantized
from moec.ir import Operation
from moec.passes.factoring.sides import Side, projection, with_matrices
from moec.pipeline.base import PassContext
from moec.quantization.packed import Packed


class Rounding(Protocol):
    """How the numbers of a matrix become codes."""

    def __call__(self, weight: torch.Tensor, block: FeedForward, side: Side, where: str) -> Packed:
        """The packed form of a matrix float [N, K], which is `side` of `block` as it is by then.

        Raises UsageError, which names `where`, for a matrix that does not fit the format.
        """


@dataclass
class BlockPacker:
    """Packs the chosen sides of blocks; `stored` are the matrices so far. What stays is refused with a reason."""

    sides: Sequence[Side]
    context: PassContext
    pass_name: str
    stored: list[Packed] = field(default_factory=list)

    def pack(self, op: Operation, block: Expert, name: str, rounding: Rounding) -> FeedForward | None:
        """The block with packed matrices; None where none of them can be packed."""
        if not isinstance(block, FeedForward):
            return None
        changed = False
        for side in self.sides:
            found = projection(block, side)
            if found is None:
                continue
            if not isinstance(found.matrix, Dense):
                state = "packed already" if isinstance(found.matrix, Quantized) else "factored"
                self.context.refuse(op, f"{name}: its matrix {side.value} is {state}", self.pass_name)
                continue
            packed = rounding(found.matrix.weight, block, side, f"{name}, {side.value}")
            matrices: dict[Side, Matrix] = {side: Quantized(packed)}
            block = with_matrices(block, matrices)
            self.stored.append(packed)
            changed = True
        return block if changed else None
