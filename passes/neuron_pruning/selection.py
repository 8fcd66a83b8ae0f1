"""Which neurons stay: a ranking by score within a scope, with a least width and a multiple for each expert."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from moec.errors import UsageError


class Scope(Enum):
    """What competes in one ranking: the neurons of an expert, of a layer's experts, or of all layers' experts."""

    EXPERT = "expert"
    LAYER = "layer"
    GLOBAL = "global"


@dataclass(frozen=True)
class ScoredExpert:
    """The scores [width] of one stored expert's neurons, float64; all neurons of a protected expert stay."""

    layer: str
    expert: int
    scores: torch.Tensor
    protected: bool = False

    @property
    def width(self) -> int:
        """Neurons."""
        return self.scores.numel()


def select_neurons(
    experts: Sequence[ScoredExpert], ratio: float, scope: Scope, *, round_to: int = 1, min_width: int = 1
) -> tuple[torch.Tensor, ...]:
    """The neurons that stay, for each expert in ascending order, i64.

    In each ranking floor(ratio * neurons) neurons go, those of the lowest score; protected neurons count, and stay.
    An expert keeps `min_width` neurons (all where it has fewer), a layer at least one. Then widths are rounded up to
    multiples of `round_to`, by the best neurons that were to go. Of equal scores the earlier neurons stay.

    Raises:
        UsageError: a score is not finite, or protection and least widths keep more than the ratio allows.
    """
    for item in experts:
        if not bool(torch.isfinite(item.scores).all()):
            raise UsageError(
                f"the scores of the neurons of expert {item.expert} are not finite",
                where=item.layer,
                hint="its weights or the calibration data hold NaN or infinity; look at it with `moec inspect`",
            )
    # best[i]: the neurons of expert i by falling score
    best = [torch.sort(item.scores, descending=True, stable=True).indices for item in experts]
    removable = [
        torch.zeros(0, dtype=torch.int64) if item.protected else order[min_width:]
        for item, order in zip(experts, best, strict=True)
    ]
    if min_width == 0:
        for members in _groups(experts, lambda index: experts[index].layer):
            last = max(members, key=lambda index: (float(experts[index].scores.amax()), -index))
            removable[last] = removable[last][1:]
    removed = [0] * len(experts)
    for members in _scopes(experts, scope):
        for index, count in _lowest(experts, removable, members, ratio):
            removed[index] = count
    kept = []
    for item, order, count in zip(experts, best, removed, strict=True):
        width = -(-(item.width - count) // round_to) * round_to
        kept.append(torch.sort(order[:width]).values)
    return tuple(kept)


def _scopes(experts: Sequence[ScoredExpert], scope: Scope) -> list[list[int]]:
    """The indices of the experts of each ranking."""
    match scope:
        case Scope.EXPERT:
            return [[index] for index, item in enumerate(experts) if not item.protected]
        case Scope.LAYER:
            return _groups(experts, lambda index: experts[index].layer)
        case Scope.GLOBAL:
            return [list(range(len(experts)))] if experts else []


def _groups(experts: Sequence[ScoredExpert], key: Callable[[int], str]) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    for index, item in enumerate(experts):
        if item.width:
            found.setdefault(key(index), []).append(index)
    return list(found.values())


def _lowest(
    experts: Sequence[ScoredExpert], removable: Sequence[torch.Tensor], members: Sequence[int], ratio: float
) -> Iterable[tuple[int, int]]:
    """(expert, how many of its neurons go) of one ranking."""
    total = sum(experts[index].width for index in members)
    # the small addend: 0.3 * 10 is 2.9999999999999996 for some spellings of 0.3
    wanted = int(ratio * total + 1e-9)
    available = sum(removable[index].numel() for index in members)
    if wanted > available:
        names = sorted({experts[index].layer for index in members})
        guarded = sum(experts[index].width for index in members if experts[index].protected)
        raise UsageError(
            f"ratio {ratio:g} takes {wanted} of {total} neurons, but only {available} may go: {guarded} are those of "
            f"protected experts, {total - guarded - available} are the least widths of the others",
            where=names[0] if len(names) == 1 else f"{len(names)} layers",
            hint=f"a ratio of at most {available / total:.4f}, a smaller min-width, or fewer protected experts",
        )
    # removable neurons stand by falling score; reversed, the lowest come first, and of equal ones the last
    owner = torch.cat([torch.full((removable[index].numel(),), index) for index in reversed(members)])
    scores = torch.cat([experts[index].scores[removable[index].flip(0)] for index in reversed(members)])
    taken = owner[torch.sort(scores, stable=True).indices[:wanted]]
    counts = torch.bincount(taken, minlength=len(experts))
    return [(index, int(counts[index])) for index in members]
