"""Experts in codes of few bits: GPTQ and coordinate descent, as `quantize` has them for `best4`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moec.calibration.sample import LayerSample
from moec.experts import Dense, FeedForward, MoeLayer, Quantized
from moec.passes.factoring.sides import Side, projection, with_matrices
from moec.passes.quantizing.blocks import Part
from moec.passes.quantizing.choices import FormatOptions, ScaleType
from moec.passes.quantizing.inputs import ExpertInputs, Policy
from moec.passes.quantizing.second_order import SecondOrder, SecondOrderOptions
from moec.quantization.packed import Packed
from moec.quantization.rounding import Target

_DAMPING = 0.01
_ROUNDS = 1
"""Rounds of descent behind GPTQ. More of them take longer for all that is offered, and gain little."""


@dataclass(frozen=True)
class Coder:
    """Makes codes of what is left of one expert, the product that gives its output last.

    `whole` are the source's inner matrices in codes of the bits that were asked for so far.
    """

    where: str
    rounding: SecondOrder = field(repr=False)
    whole: dict[int, dict[Side, Packed]] = field(default_factory=dict, repr=False)

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

    def inner(self, expert: FeedForward, bits: int, neurons: Sequence[int] = ()) -> FeedForward:
        """With all matrices but the last one in codes; the expert has these `neurons` of the source, or all.

        Rows are rounded each by itself, so that those of some neurons are rows of the whole.
        """
        source = self.rounding.source
        if bits not in self.whole:
            sides = (side for side in (Side.GATE, Side.UP) if projection(source, side) is not None)
            self.whole[bits] = {side: self._packed(source, side, bits) for side in sides}
        packed = self.whole[bits]
        if neurons:
            packed = {side: item.of_rows(neurons) for side, item in packed.items()}
        return with_matrices(expert, {side: Quantized(item) for side, item in packed.items()})

    def outer(self, expert: FeedForward, bits: int) -> FeedForward:
        """With the last matrix in codes, as it is best behind the others, which are as they will be."""
        return with_matrices(expert, {Side.DOWN: Quantized(self._packed(expert, Side.DOWN, bits))})

    def _packed(self, expert: FeedForward, side: Side, bits: int) -> Packed:
        found = projection(expert, side)
        assert found is not None and isinstance(found.matrix, Dense)
        return self.rounding(Part(found.matrix.weight, expert, side, f"{self.where}, {side.value}", bits))


def coded_inputs(layer: MoeLayer, sample: LayerSample) -> ExpertInputs:
    """What experts of a layer read, by the squares of their gates."""
    return ExpertInputs(layer, sample, Policy.OUTPUT)
