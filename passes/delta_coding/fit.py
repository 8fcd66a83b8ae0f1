"""One base for the same matrix of several experts, and the signs by which each of them differs from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moec.experts import Dense, Quantized
from moec.passes.delta_coding.signs import largest_signs, least_squares_scale

Pack = Callable[[torch.Tensor], Dense | Quantized]
"""How a base [N, K] is stored."""


@dataclass(frozen=True)
class Coded:
    """A `base` and int8 signs [N, K] of each expert in order; `scales` have the least squared error, `deviations` are
    the standard deviations of the differences, by which ComPEFT measures scales."""

    base: Dense | Quantized
    signs: tuple[torch.Tensor, ...]
    scales: tuple[float, ...]
    deviations: tuple[float, ...]


def fit_signs(
    matrices: Sequence[Callable[[], torch.Tensor]],
    shares: Sequence[float],
    density: float,
    rounds: int,
    pack: Pack,
) -> Coded:
    """Codes matrices [N, K], loaded when they are needed, as a base and signs.

    The first base is their mean, weighted by `shares`. Each further round takes as base the mean of what the signs
    leave, which cannot raise the squared error of a base that is stored as it is.
    """
    total = sum(shares)
    weights = [share / total for share in shares] if total > 0 else [1 / len(shares)] * len(shares)
    signs: list[torch.Tensor] = []
    scales: list[float] = []
    deviations: list[float] = []
    base: Dense | Quantized | None = None
    for _ in range(rounds):
        mean: torch.Tensor | None = None
        for place, (load, weight) in enumerate(zip(matrices, weights, strict=True)):
            left = load().double()
            if signs:
                left = left - scales[place] * signs[place].double()
            mean = weight * left if mean is None else mean + weight * left
        assert mean is not None
        base = pack(mean.float())
        stored = base.dense().double()
        signs, scales, deviations = [], [], []
        for load in matrices:
            difference = load().double() - stored
            signs.append(largest_signs(difference, density))
            scales.append(least_squares_scale(difference, signs[-1]))
            deviations.append(float(difference.std(correction=0)))
    assert base is not None
    return Coded(base, tuple(signs), tuple(scales), tuple(deviations))
