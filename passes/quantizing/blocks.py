"""The matrices of a feed-forward block, one after the other, as packed ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from moec.experts import Banded, Dense, Expert, FeedForward, Matrix, Quantized
from moec.ir import Operation
from moec.passes.factoring.sides import Side, projection, with_matrices
from moec.passes.neuron_pruning.slicing import slice_neurons
from moec.pipeline.base import PassContext
from moec.quantization.bit_plan import Band, ExpertBits
from moec.quantization.packed import Packed


@dataclass(frozen=True)
class Part:
    """A matrix `weight` float [N, K] to pack, which is `side` of `block` as it is by then.

    `bits` None are those of the options. With `inputs` int64 [K] it is only these columns of the side.
    """

    weight: torch.Tensor
    block: FeedForward
    side: Side
    where: str
    bits: int | None = None
    inputs: torch.Tensor | None = None


class Rounding(Protocol):
    """How the numbers of a matrix become codes."""

    def __call__(self, part: Part) -> Packed:
        """The packed form of a matrix. Raises UsageError, which names `where`, if it does not fit the format."""


@dataclass
class BlockPacker:
    """Packs the chosen sides of blocks; `stored` are the matrices so far. What stays is refused with a reason."""

    sides: Sequence[Side]
    context: PassContext
    pass_name: str
    stored: list[Packed] = field(default_factory=list)

    def pack(
        self, op: Operation, block: Expert, name: str, rounding: Rounding, bits: ExpertBits | None = None
    ) -> FeedForward | None:
        """The block with packed matrices, of `bits` where a plan says so; None where none of them can be packed."""
        if not isinstance(block, FeedForward):
            return None
        if bits is not None and bits.bands:
            return self._pack_bands(block, name, rounding, bits.bands)
        changed = False
        for side in self.sides:
            found = projection(block, side)
            if found is None:
                continue
            if not isinstance(found.matrix, Dense):
                state = "packed already" if isinstance(found.matrix, Quantized | Banded) else "factored"
                self.context.refuse(op, f"{name}: its matrix {side.value} is {state}", self.pass_name)
                continue
            own = None if bits is None else getattr(bits, side.value)
            packed = rounding(Part(found.matrix.weight, block, side, f"{name}, {side.value}", own))
            matrices: dict[Side, Matrix] = {side: Quantized(packed)}
            block = with_matrices(block, matrices)
            self.stored.append(packed)
            changed = True
        return block if changed else None

    def _pack_bands(
        self, block: FeedForward, name: str, rounding: Rounding, bands: Sequence[Band]
    ) -> FeedForward | None:
        """The block with its neurons in the order of the bands, each of which has packed matrices of its own."""
        order = [neuron for band in bands for neuron in band.neurons]
        if sorted(order) != list(range(block.width)) or any(
            not isinstance(item.matrix, Dense) for side in Side if (item := projection(block, side)) is not None
        ):
            return None
        block = slice_neurons(block, torch.tensor(order))
        for side in self.sides:
            found = projection(block, side)
            if found is None:
                continue
            axis = 1 if side is Side.DOWN else 0
            parts, first = [], 0
            for band in bands:
                columns = torch.arange(first, first + len(band.neurons))
                weight = found.dense().index_select(axis, columns)
                inputs = columns if axis else None
                parts.append(rounding(Part(weight, block, side, f"{name}, {side.value}", band.bits, inputs)))
                first += len(band.neurons)
            self.stored += parts
            matrices: dict[Side, Matrix] = {side: Banded(tuple(map(Quantized, parts)), axis)}
            block = with_matrices(block, matrices)
        return block
