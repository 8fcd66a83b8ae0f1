"""The k-th smallest of very many scores that are seen part by part, exactly and in little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

_HALF = 1 << 16


@dataclass
class Threshold:
    """Scores below `value` go, and of those equal to it the first `ties`, in the order in which they are seen."""

    value: float
    ties: int

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """Which of `scores` (float32) stay. Takes its ties: each part is to be asked for once, in order."""
        kept = scores > self.value
        equal = (scores == self.value).flatten()
        stay = equal & (torch.cumsum(equal, 0) > self.ties)
        self.ties -= min(self.ties, int(equal.sum()))
        return kept | stay.reshape(scores.shape)


def find_threshold(parts: Callable[[], Iterable[torch.Tensor]], removed: int) -> Threshold:
    """The threshold below which `removed` scores lie, fewer than there are.

    `parts()` gives all scores anew each time, float32, not negative and no NaN.
    Non-negative floats are ordered as their bits are, so that two histograms, of the upper and of the lower half of the
    bits, find the exact value.
    """
    upper = torch.zeros(_HALF, dtype=torch.int64)
    for part in parts():
        upper += torch.bincount(_bits(part) >> 16, minlength=_HALF)
    first, below = _bin_of(upper, removed)
    lower = torch.zeros(_HALF, dtype=torch.int64)
    for part in parts():
        bits = _bits(part)
        lower += torch.bincount(bits[bits >> 16 == first] & (_HALF - 1), minlength=_HALF)
    second, further = _bin_of(lower, removed - below)
    value = torch.tensor(first << 16 | second, dtype=torch.int32).view(torch.float32)
    return Threshold(float(value), removed - below - further)


def _bits(scores: torch.Tensor) -> torch.Tensor:
    # adding 0 makes -0.0 positive
    return (scores.detach().float().flatten() + 0.0).view(torch.int32).to(torch.int64)


def _bin_of(histogram: torch.Tensor, rank: int) -> tuple[int, int]:
    """(the bin that holds the element `rank`, from 0, in ascending order; how many lie in lower bins)."""
    ends = torch.cumsum(histogram, 0)
    index = int(torch.searchsorted(ends, torch.tensor(rank), right=True))
    return index, int(ends[index] - histogram[index])
