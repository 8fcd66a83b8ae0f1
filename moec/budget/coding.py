"""Experts in codes of few bits: GPTQ and coordinate descent, as `quantize` has them for `best4`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch

from moec.calibration.sample import LayerSample
from moec.dialects.quant import Format
from moec.experts import Dense, FeedForward, MoeLayer, Quantized
from moec.passes.factoring.sides import Side, dense_matrix, projection, sides_of, with_matrices
from moec.passes.neuron_pruning.slicing import slice_neurons
from moec.passes.quantizing.blocks import Part
from moec.passes.quantizing.choices import FormatOptions, ScaleType
from moec.passes.quantizing.inputs import ExpertInputs, Policy
from moec.passes.quantizing.second_order import SecondOrder, SecondOrderOptions
from moec.quantization.grids import GridSettings
from moec.quantization.packed import Packed
from moec.quantization.rounding import Target, round_matrix

_DAMPING = 0.01
_ROUNDS = 1
"""Rounds of descent behind GPTQ. More of them take longer for all that is offered, and gain little."""
_OTHERS = 2048
"""So many rows stand for all tokens, which weigh little beside those that chose an expert."""


@dataclass(frozen=True)
class Coder:
    """Makes codes of what is left of one expert, the product that gives its output last.

    `whole` are the source's inner matrices in codes of the bits that were asked for so far, `inner` the experts that
    have them, of some neurons.
    """

    where: str
    rounding: SecondOrder = field(repr=False)
    whole: dict[int, dict[Side, Packed]] = field(default_factory=dict, repr=False)
    inner: dict[tuple[tuple[int, ...], int], FeedForward] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(source: FeedForward, inputs: ExpertInputs, number: int, group: int, *, refit: bool) -> Coder:
        """That of the expert `number`, which is `source` before anything is taken from it.

        Codes have scales for `group` inputs, for a whole row where that does not divide it. With `refit` the last
        product makes up for what the others lost, and for neurons that are gone, before it is coded itself.
        """

        def target(bits: int | None, columns: int) -> Target:
            assert bits is not None
            size = str(group) if columns % group == 0 else "row"
            return FormatOptions(bits=bits, group=size, scales=ScaleType.F16).target()

        options = SecondOrderOptions(target, _DAMPING, rounds=_ROUNDS, refit=refit)
        where = f"{inputs.layer.name}, expert {number}"
        return Coder(where, SecondOrder(options, source, *inputs.rows(number)))

    def stored_bytes(self, expert: FeedForward, bits: int, down_bits: int) -> int:
        """Bytes of its matrices in codes, scales included: all rows of a matrix take the same."""
        total = 0
        for side in sides_of(expert):
            rows, columns = dense_matrix(expert, side).shape
            target = self.rounding.options.target(down_bits if side is Side.DOWN else bits, columns)
            total += rows * _row_bytes(target.format, target.settings.scale_dtype, columns)
        return total

    def coded(self, neurons: tuple[int, ...], bits: int, down_bits: int) -> FeedForward:
        """The expert with these `neurons` of the source, or all, and `down_bits` for its last matrix.

        That is as it is best behind the others, which are as they will be.
        """
        key = (neurons, bits)
        if key not in self.inner:
            self.inner[key] = self._inner(neurons, bits)
        inner = self.inner[key]
        return with_matrices(inner, {Side.DOWN: Quantized(self._packed(inner, Side.DOWN, down_bits))})

    def _inner(self, neurons: tuple[int, ...], bits: int) -> FeedForward:
        """With all matrices but the last one in codes: rows are rounded each by itself, also those of neurons that go.

        So the rows of some neurons are those of the whole.
        """
        source = self.rounding.source
        if bits not in self.whole:
            sides = (side for side in sides_of(source) if side is not Side.DOWN)
            self.whole[bits] = {side: self._packed(source, side, bits) for side in sides}
        packed, smaller = self.whole[bits], source
        if neurons:
            smaller = slice_neurons(source, torch.tensor(neurons))
            packed = {side: item.of_rows(neurons) for side, item in packed.items()}
        return with_matrices(smaller, {side: Quantized(item) for side, item in packed.items()})

    def _packed(self, expert: FeedForward, side: Side, bits: int) -> Packed:
        found = projection(expert, side)
        assert found is not None and isinstance(found.matrix, Dense)
        return self.rounding(Part(found.matrix.weight, expert, side, f"{self.where}, {side.value}", bits))


@cache
def _row_bytes(kind: Format, scale_dtype: torch.dtype, columns: int) -> int:
    return round_matrix(Target(kind, GridSettings(scale_dtype)), torch.zeros(1, columns)).nbytes


def coded_inputs(layer: MoeLayer, sample: LayerSample) -> ExpertInputs:
    """What experts of a layer read, by the squares of their gates."""
    return ExpertInputs(layer, sample, Policy.OUTPUT, _OTHERS)
