"""How many bits the matrices of experts get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Band:
    """Neurons of an expert, by their numbers, whose weights get `bits`."""

    neurons: tuple[int, ...]
    bits: int


@dataclass(frozen=True)
class ExpertBits:
    """The bits of an expert's matrices, `gate`, `up` and `down`; with `bands` those of its neurons instead.

    Bands hold every neuron once; a band is rows of gate and up, and columns of down.
    """

    gate: int = 0
    up: int = 0
    down: int = 0
    bands: tuple[Band, ...] = ()

    @staticmethod
    def uniform(bits: int) -> ExpertBits:
        """The same bits for all matrices."""
        return ExpertBits(bits, bits, bits)


@dataclass(frozen=True)
class BitPlan:
    """The bits of all experts of a module: for each layer by name, one entry per stored expert; None leaves it alone.

    `average` is the mean over the weights of planned experts, `cost` what the objective says of the plan.
    """

    layers: Mapping[str, tuple[ExpertBits | None, ...]]
    average: float
    cost: float
