"""Experts in codes of few bits, as `quantize` packs them: integers with zero points, ranges searched for few bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moec.budget.local_fit import refitted
from moec.experts import Dense, FeedForward, Matrix, Quantized
from moec.passes.factoring.sides import Side, projection, with_matrices
from moec.passes.quantizing.choices import FormatOptions, ScaleType
from moec.quantization.rounding import round_matrix

_SEARCHED_BITS = 3
"""Up to so many bits narrower ranges round much better; beyond them a search takes its time for little."""


@dataclass(frozen=True)
class Wanted:
    """What a last product is fitted to before it becomes codes: `outputs` [n, H] for `inputs` [n, H] with `gates` [n].

    `ridge` is the weight of its squared change.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    gates: torch.Tensor
    ridge: float


def codable(expert: FeedForward) -> bool:
    """Whether all matrices are plain."""
    found = [item for side in Side if (item := projection(expert, side)) is not None]
    return all(isinstance(item.matrix, Dense) for item in found)


def coded(expert: FeedForward, bits: int, group: int, wanted: Wanted | None) -> FeedForward:
    """The expert with all matrices in codes; `group` inputs share a scale, a whole row where that does not divide it.

    With `wanted` the last product makes up for what the others lost before it is coded itself.
    """
    for side in Side:
        found = projection(expert, side)
        if found is None:
            continue
        if side is Side.DOWN and wanted is not None:
            expert = refitted(expert, wanted.inputs, wanted.outputs, wanted.gates, wanted.ridge)
            found = expert.down
        assert isinstance(found.matrix, Dense)
        size = str(group) if found.matrix.shape[1] % group == 0 else "row"
        target = FormatOptions(bits=bits, group=size, scales=ScaleType.F16, search=bits <= _SEARCHED_BITS).target()
        matrices: dict[Side, Matrix] = {side: Quantized(round_matrix(target, found.matrix.weight))}
        expert = with_matrices(expert, matrices)
    return expert
