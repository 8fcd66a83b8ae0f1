"""Bands of neurons with bits of their own, by how much each neuron adds to the output of its layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moec.quantization.bit_plan import Band, ExpertBits


def bands_by_energy(
    energies: Sequence[torch.Tensor], bits: Sequence[int], shares: Sequence[float], multiple: int
) -> list[ExpertBits]:
    """The bits of all experts of a layer, whose neurons have `energies` [m] each (CAMERA, arXiv 2508.02322).

    Of all neurons of the layer together, by falling energy, the first share gets the first of `bits`, and so on; in
    each expert the number of neurons up to each border is rounded to a multiple of `multiple`, which divides m.
    """
    joined = torch.cat(list(energies))
    ranks = torch.empty(len(joined), dtype=torch.int64)
    ranks[joined.sort(descending=True, stable=True).indices] = torch.arange(len(joined))
    borders = [round(sum(shares[: place + 1]) * len(joined)) for place in range(len(shares) - 1)]
    found = []
    start = 0
    for energy in energies:
        own = ranks[start : start + len(energy)]
        start += len(energy)
        order = energy.sort(descending=True, stable=True).indices
        ends = [0, *(_rounded(int((own < border).sum()), multiple) for border in borders), len(energy)]
        bands = [
            Band(tuple(order[first:last].tolist()), count)
            for first, last, count in zip(ends, ends[1:], bits, strict=False)
            if last > first
        ]
        found.append(ExpertBits(bands=tuple(bands)))
    return found


def _rounded(count: int, multiple: int) -> int:
    return (2 * count + multiple) // (2 * multiple) * multiple
