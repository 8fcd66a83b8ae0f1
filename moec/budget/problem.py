"""The choice as numbers: for each expert options with bytes, FLOPs and distortion, of which one is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

OWN = -1
"""The target of an option that is no redirect."""


@dataclass(frozen=True)
class Item:
    """One expert of the layer `group`; arrays [options].

    `target` is the item that an option redirects to, OWN for others; `stored` options count as experts of their own,
    and `good` ones may be redirected to.
    """

    group: int
    bytes: NDArray[np.int64]
    flops: NDArray[np.float64]
    distortion: NDArray[np.float64]
    target: NDArray[np.int64]
    stored: NDArray[np.bool_]
    good: NDArray[np.bool_]

    def restricted(self, kept: NDArray[np.bool_]) -> Item:
        """With only some of its options."""
        return Item(
            self.group,
            self.bytes[kept],
            self.flops[kept],
            self.distortion[kept],
            self.target[kept],
            self.stored[kept],
            self.good[kept],
        )


@dataclass(frozen=True)
class Problem:
    """Items, at most `bytes` and, where it is set, `flops` in all, and at least `least[group]` stored per group."""

    items: tuple[Item, ...]
    bytes: int
    flops: float | None
    least: tuple[int, ...]

    @cached_property
    def coupled(self) -> bool:
        """Whether what one item does depends on another one."""
        return any(bool((item.target != OWN).any()) for item in self.items)

    def restricted(self, kept: Sequence[NDArray[np.bool_]]) -> Problem:
        """With only some of the options of each item."""
        items = tuple(item.restricted(mask) for item, mask in zip(self.items, kept, strict=True))
        return Problem(items, self.bytes, self.flops, self.least)

    def minimum_bytes(self) -> int:
        """The fewest bytes that any choice takes, whatever it loses."""
        total = 0
        extra: dict[int, list[int]] = {group: [] for group in range(len(self.least))}
        for item in self.items:
            own = item.target == OWN
            lowest = int(item.bytes[own].min())
            total += lowest
            if item.stored.any():
                extra[item.group].append(int(item.bytes[item.stored].min()) - lowest)
        return total + sum(sum(sorted(extra[group])[:count]) for group, count in enumerate(self.least))

    def minimum_flops(self) -> float:
        """The fewest FLOPs of any choice, not counting that experts must be stored."""
        return float(sum(item.flops[item.target == OWN].min() for item in self.items))

    def violation(self, choices: Sequence[int]) -> str:
        """The first rule that choices break, in words; empty where they keep all."""
        picked = list(zip(self.items, choices, strict=True))
        taken = sum(int(item.bytes[choice]) for item, choice in picked)
        if taken > self.bytes:
            return f"{taken} bytes, of {self.bytes}"
        work = self.flops_of(choices)
        if self.flops is not None and work > self.flops * (1 + 1e-9):
            return f"{work} FLOPs, of {self.flops}"
        for item, choice in picked:
            target = int(item.target[choice])
            if target != OWN and not self.items[target].good[choices[target]]:
                return f"a redirect to item {target}, which does not stay good"
        for group, least in enumerate(self.least):
            stored = sum(bool(item.stored[choice]) for item, choice in picked if item.group == group)
            if stored < least:
                return f"{stored} stored in group {group}, which needs {least}"
        return ""

    def bytes_of(self, choices: Sequence[int]) -> int:
        """Bytes of a choice."""
        return sum(int(item.bytes[choice]) for item, choice in zip(self.items, choices, strict=True))

    def flops_of(self, choices: Sequence[int]) -> float:
        """FLOPs of a choice."""
        return float(sum(item.flops[choice] for item, choice in zip(self.items, choices, strict=True)))

    def distortion_of(self, choices: Sequence[int]) -> float:
        """What a choice loses."""
        return float(sum(item.distortion[choice] for item, choice in zip(self.items, choices, strict=True)))


@dataclass(frozen=True)
class Solution:
    """An option for each item, from the solver `name`; nothing loses less than `bound`."""

    choices: tuple[int, ...]
    distortion: float
    bound: float
    name: str

    @property
    def gap(self) -> float:
        """(distortion - bound) / distortion; 0 is proven best."""
        return max(0.0, (self.distortion - self.bound) / self.distortion) if self.distortion > 0 else 0.0
