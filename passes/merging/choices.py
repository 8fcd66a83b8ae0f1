"""The choices that merging offers, and how many experts stay."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch

from moec.calibration.statistics import LayerStatistics
from moec.errors import UsageError


class Grouping(Enum):
    """What makes experts go together."""

    ROUTER_COSINE = "router-cosine"
    MEAN_OUTPUT = "mean-output"
    WEIGHT = "weight"
    SPECTRAL = "spectral"
    CO_ACTIVATION = "co-activation"
    FACILITY = "facility"
    RANDOM = "random"


class Selection(Enum):
    """Whether each layer keeps its share, or all layers together."""

    LAYER = "layer"
    GLOBAL = "global"


class Alignment(Enum):
    """How neurons are matched before they are averaged."""

    NONE = "none"
    WEIGHT = "weight"
    ACTIVATION = "activation"


class Weighting(Enum):
    """What an expert counts in the mean of its group: as any other, by tokens, by gates, or by gated output norms."""

    UNIFORM = "uniform"
    FREQUENCY = "frequency"
    GATE = "gate"
    SALIENCY = "saliency"

    def importance(self, statistics: LayerStatistics) -> list[float]:
        """[E]; `uniform` ranks by tokens."""
        if self is Weighting.GATE:
            return _floats(statistics.gate_mass)
        return _floats(statistics.gated_norm_sum if self is Weighting.SALIENCY else statistics.count)


class RouterChange(Enum):
    """What becomes of the router outputs of experts that go."""

    ALIAS = "alias"
    KEEP_ROW = "keep-row"
    LOG_SUM_EXP = "log-sum-exp"


def keep_problem(keep: float) -> str | None:
    """Why `keep` is neither a number of experts nor a share; None where it is one."""
    if not keep > 0:
        return f"keep = {keep:g} leaves no experts"
    if keep > 1 and keep != int(keep):
        return f"keep = {keep:g} is neither a number of experts nor a share of at most 1"
    return None


def experts_to_keep(keep: float, size: int) -> int:
    """How many of `size` experts stay: a share below 1 rounds to the nearest, at least one; 1 is one expert."""
    return min(size, int(keep)) if keep >= 1 else max(1, round(keep * size))


def require_room(where: str, count: int, size: int, minimum: int, alone: int, protected: int) -> None:
    """Raises UsageError where `count` of `size` experts cannot stay.

    `minimum` outputs must be left to the router; `protected` experts stay, `alone` of them without company.
    """
    if count < min(minimum, size):
        raise UsageError(
            f"{count} experts cannot stay: each token chooses {minimum} of them",
            where=where,
            hint=f"keep at least {minimum}, or keep all router outputs with router=alias",
        )
    if count < protected or (count < size and count <= alone):
        raise UsageError(
            f"{count} experts cannot stay: {protected} are protected",
            where=where,
            hint="keep more experts, or keep-dominant, which sends tokens to protected experts without changing them",
        )


def _floats(values: torch.Tensor) -> list[float]:
    return [float(value) for value in values]


def global_choice(
    importance: Sequence[Sequence[float]],
    total: int,
    required: Sequence[frozenset[int]],
    minimum: Sequence[int],
) -> list[tuple[int, ...]]:
    """The `total` experts with the largest share of their layer's importance, at least `minimum` of each layer.

    M-SMoE (arXiv 2310.01334, section 3.2), with ties to the earlier layer and the lower index.
    """
    ranked: list[tuple[int, float, int, int]] = []
    for layer, values in enumerate(importance):
        whole = sum(values) or 1.0
        order = sorted(range(len(values)), key=lambda e: (e not in required[layer], -values[e], e))
        for place, expert in enumerate(order):
            first = expert in required[layer] or place < minimum[layer]
            ranked.append((0 if first else 1, -values[expert] / whole, layer, expert))
    chosen = sorted(ranked)[:total]
    return [
        tuple(sorted(expert for _, _, owner, expert in chosen if owner == layer)) for layer in range(len(importance))
    ]
