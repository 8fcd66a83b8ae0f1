"""What it costs a layer if one of its experts, or one matrix of it, gets fewer bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from moec.calibration.sample import LayerSample
from moec.dialects.quant import Integer
from moec.experts import Dense, FeedForward, Matrix, MoeLayer, Quantized
from moec.passes.factoring.sides import Side, dense_matrix, sides_of, with_matrices
from moec.passes.quantizing.blocks import Part, Rounding
from moec.passes.quantizing.choices import Coding
from moec.passes.quantizing.inputs import ExpertInputs, Policy
from moec.passes.quantizing.second_order import SecondOrder, SecondOrderOptions
from moec.quantization.rounding import Target, round_matrix


class Objective(Enum):
    """The cost of a choice of bits; g are gates, F an expert, d the change that rounding causes.

    OUTPUT: sum of g^2 |dF|^2, the squared error of the layer's output. PMQ: that times the share of tokens and the
    share of gates to the power 1.5 (MC-MoE). FREQUENCY: the share of tokens times the relative
    squared error of the weights. ENERGY: sum of g^2 |F|^2 times that.

    Measured, not estimated, as the loss of the whole model on the calibration text: SINGLE_DROP with one expert in the
    least bits and all others in the most (EdgeMoE). PAIRWISE: that, and what two experts in the least bits cost more
    than each alone (second-order sensitivities with dependencies between layers).
    """

    OUTPUT = "output"
    PMQ = "pmq"
    FREQUENCY = "frequency"
    ENERGY = "energy"
    SINGLE_DROP = "single-drop"
    PAIRWISE = "pairwise"

    @property
    def is_measured(self) -> bool:
        """Whether it is the loss of the model."""
        return self in (Objective.SINGLE_DROP, Objective.PAIRWISE)


_GATE_POWER = 1.5
# gptq: as `quantize` has it by default
_DAMPING = 0.1


@dataclass(frozen=True)
class LayerCosts:
    """Costs of one layer, relative to the energy of its output on the sample, if codes are chosen by `coding`."""

    layer: MoeLayer
    sample: LayerSample
    objective: Objective
    coding: Coding = Coding.RTN

    def of(self, number: int, expert: FeedForward, targets: Sequence[Target], *, by_side: bool) -> list[list[float]]:
        """[units, choices]: of the whole expert, or of its matrices in the order of `sides_of`."""
        rows, gates = self.sample.chosen(self.layer, number)
        x = self.sample.x[rows].float()
        wanted = expert.apply(x).double() * gates[:, None]
        units = [[side] for side in sides_of(expert)] if by_side else [list(sides_of(expert))]
        scale = self._scale(len(rows), gates, wanted)
        rounding = self._rounding(number, expert, targets)
        found = []
        for sides in units:
            costs = []
            for target in targets:
                changed = _coded(expert, sides, target, rounding)
                costs.append(scale * self._error(expert, changed, x, gates, wanted))
            found.append(costs)
        return found

    def _rounding(self, number: int, expert: FeedForward, targets: Sequence[Target]) -> Rounding:
        """How the matrices of one expert become codes of the bits of a part."""
        by_bits = {target.format.bits: target for target in targets if isinstance(target.format, Integer)}
        if self.coding is Coding.RTN:
            return lambda part: round_matrix(by_bits[part.bits or 0], part.weight, part.where)
        options = SecondOrderOptions(lambda bits, _: by_bits[bits or 0], _DAMPING)
        return SecondOrder(options, expert, *ExpertInputs(self.layer, self.sample, Policy.AUTO).rows(number))

    def _scale(self, tokens: int, gates: torch.Tensor, wanted: torch.Tensor) -> float:
        """What an error is multiplied with."""
        share = tokens / max(len(self.sample), 1)
        energy = max(float(self.sample.y.double().square().sum()), torch.finfo(torch.float64).tiny)
        match self.objective:
            case Objective.OUTPUT:
                return 1 / energy
            case Objective.PMQ:
                total = float(self.sample.route(self.layer).gates.double().sum())
                return share * float((gates.sum() / max(total, 1e-30)) ** _GATE_POWER) / energy
            case Objective.FREQUENCY:
                return share
            case Objective.ENERGY:
                return float(wanted.square().sum()) / energy
        raise AssertionError(f"{self.objective.value} is no cost of one layer")

    def _error(
        self,
        expert: FeedForward,
        changed: Mapping[Side, Quantized],
        x: torch.Tensor,
        gates: torch.Tensor,
        wanted: torch.Tensor,
    ) -> float:
        if self.objective in (Objective.OUTPUT, Objective.PMQ):
            matrices: dict[Side, Matrix] = {side: Dense(matrix.dense()) for side, matrix in changed.items()}
            found = with_matrices(expert, matrices).apply(x).double() * gates[:, None]
            return float((found - wanted).square().sum())
        wrong = total = 0.0
        for side, matrix in changed.items():
            weight = dense_matrix(expert, side)
            wrong += float((matrix.dense() - weight).double().square().sum())
            total += float(weight.double().square().sum())
        return wrong / max(total, torch.finfo(torch.float64).tiny)


def _coded(expert: FeedForward, sides: Sequence[Side], target: Target, rounding: Rounding) -> dict[Side, Quantized]:
    """Some matrices of an expert in codes, each for what it reads behind those before it."""
    assert isinstance(target.format, Integer)
    found: dict[Side, Quantized] = {}
    for side in sides:
        block = with_matrices(expert, dict(found))
        part = Part(dense_matrix(block, side), block, side, side.value, target.format.bits)
        found[side] = Quantized(rounding(part))
    return found
