"""How the neurons of one block are divided: those that every token runs, and those of each expert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch

from moec.errors import UsageError
from moec.experts import FeedForward
from moec.passes.factorizing.activity import Activity, Observed, markers
from moec.passes.factorizing.co_activation import co_active_groups
from moec.passes.factorizing.co_activation_graph import graph_groups
from moec.passes.factorizing.importance import loss_share, mean_activity, text_clusters
from moec.passes.factorizing.partition import (
    balanced_assignment,
    balanced_k_means,
    contiguous,
    group_sizes,
    shuffled,
)


class Partition(Enum):
    """Which neurons become one expert."""

    CONTIGUOUS = "contiguous"  # neighbours, as FactorLLM
    RANDOM = "random"  # drawn, as LLaMA-MoE
    K_MEANS = "k-means"  # those with similar weights, as MoEfication
    CO_ACTIVATION = "co-activation"  # those that are active on the same tokens, as CMoE
    CO_ACTIVATION_GRAPH = "co-activation-graph"  # the same, by cutting a graph, as MoEfication
    GRADIENT = "gradient"  # those that matter to the loss of one kind of text, as LLaMA-MoE
    GRADIENT_OVERLAP = "gradient-overlap"  # the same, where several kinds may have a neuron (LLaMA-MoE, inner-share)
    DOMAIN_MASKS = "domain-masks"  # those that one kind of text uses most; several may have a neuron (Read-ME)

    @property
    def reads_text(self) -> bool:
        """Whether it needs a calibration."""
        return self not in (Partition.CONTIGUOUS, Partition.RANDOM, Partition.K_MEANS)

    @property
    def overlaps(self) -> bool:
        """Whether neurons may be in several experts, or in none: then one expert is all that a token should choose."""
        return self in (Partition.GRADIENT_OVERLAP, Partition.DOMAIN_MASKS)


class RowsOf(Enum):
    """Whose rows k-means compares; neurons without a gate have up and down only."""

    GATE = "gate"
    UP = "up"
    DOWN = "down"


class SharedBy(Enum):
    """Which neurons every token runs."""

    COLUMNS = "columns"  # those whose columns of down are the largest
    ACTIVATION_RATE = "activation-rate"  # those that are active most often, as CMoE
    GRADIENT = "gradient"  # those that most kinds of text would give to their expert, as LLaMA-MoE

    @property
    def reads_text(self) -> bool:
        """Whether it needs a calibration."""
        return self is not SharedBy.COLUMNS


class Uneven(Enum):
    """What happens where the experts do not divide the width."""

    REFUSE = "refuse"
    PAD = "pad"  # all experts get the larger width; the neurons that are missing are zero
    RAGGED = "ragged"  # widths differ by one


Text = Callable[[], Observed]


@dataclass(frozen=True)
class Division:
    """The options of a division. `active` neurons count as active on a token, 0 is a tenth of the width; `keep` is the
    share of the neurons that each of several overlapping experts has."""

    experts: int
    partition: Partition
    rows: RowsOf
    activity: Activity
    active: int
    iterations: int
    shared: int
    shared_by: SharedBy
    uneven: Uneven
    keep: float

    @property
    def reads_text(self) -> bool:
        """Whether it needs a calibration."""
        return self.partition.reads_text or bool(self.shared and self.shared_by.reads_text)

    def divide(
        self, where: str, block: FeedForward, text: Text, generator: torch.Generator
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """(neurons that stay dense, neurons of each expert), ascending; `text` is asked for where it is needed.

        Where experts overlap, what all of them would have stays dense.
        Raises UsageError that names `where` for a width that cannot be divided so and for too little text.
        """
        scores = _Scores(self, where, block, text, generator)
        if self.partition.overlaps:
            return self._overlapping(scores, block.width)
        routed = block.width - self.shared
        if routed < self.experts:
            raise UsageError(f"{routed} of {block.width} neurons are too few for {self.experts} experts", where=where)
        if routed % self.experts and self.uneven is Uneven.REFUSE:
            raise UsageError(
                f"{self.experts} experts do not divide {routed} neurons",
                where=where,
                hint="choose another number, or uneven=pad or uneven=ragged",
            )
        if not self.shared:
            return None, self._partition(scores, torch.arange(routed), generator)
        shared = _first(scores.sharing(), self.shared).sort().values
        rest = torch.ones(block.width, dtype=torch.bool)
        rest[shared] = False
        return shared, self._partition(scores, rest.nonzero()[:, 0], generator)

    def active_neurons(self, width: int) -> int:
        """How many neurons of a block count as active."""
        return min(self.active or max(1, width // 10), width)

    def _overlapping(self, scores: _Scores, width: int) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        count = max(1, int(self.keep * width))
        worth = scores.use_by_kind() if self.partition is Partition.DOMAIN_MASKS else scores.by_kind()
        masks = torch.zeros(self.experts, width, dtype=torch.bool)
        for mask, row in zip(masks, worth, strict=True):
            mask[_first(row, count)] = True
        everywhere = masks.all(dim=0)
        groups = [(mask & ~everywhere).nonzero()[:, 0] for mask in masks]
        return (everywhere.nonzero()[:, 0] if bool(everywhere.any()) else None), groups

    def _partition(self, scores: _Scores, neurons: torch.Tensor, generator: torch.Generator) -> list[torch.Tensor]:
        sizes = group_sizes(len(neurons), self.experts)
        match self.partition:
            case Partition.CONTIGUOUS:
                groups = contiguous(sizes)
            case Partition.RANDOM:
                groups = shuffled(sizes, generator)
            case Partition.K_MEANS:
                groups = balanced_k_means(scores.rows()[neurons], sizes, generator)
            case Partition.CO_ACTIVATION:
                groups = co_active_groups(scores.markers()[:, neurons], sizes, self.iterations)
            case Partition.CO_ACTIVATION_GRAPH:
                groups = graph_groups(scores.markers()[:, neurons], sizes)
            case _:
                labels = balanced_assignment(-scores.by_kind()[:, neurons].T, sizes)
                groups = [(labels == group).nonzero()[:, 0] for group in range(self.experts)]
        return [neurons[group] for group in groups]


class _Scores:
    """What neurons are divided by, each computed once."""

    def __init__(
        self, division: Division, where: str, block: FeedForward, text: Text, generator: torch.Generator
    ) -> None:
        self._division = division
        self._where = where
        self._block = block
        self._text = text
        self._generator = generator
        self._markers: torch.Tensor | None = None
        self._by_kind: torch.Tensor | None = None

    def rows(self) -> torch.Tensor:
        """One vector of length 1 for each neuron [m, H]."""
        block = self._block
        if self._division.rows is RowsOf.DOWN:
            rows = block.down.dense().T
        else:
            rows = (block.up if self._division.rows is RowsOf.UP or block.gate is None else block.gate).dense()
        return torch.nn.functional.normalize(rows, dim=1)

    def markers(self) -> torch.Tensor:
        """bool [n, m]: which neurons are active on which token."""
        if self._markers is None:
            active = self._division.active_neurons(self._block.width)
            self._markers = markers(self._block, self._text(), active, self._division.activity)
        return self._markers

    def by_kind(self) -> torch.Tensor:
        """What neurons are worth to as many kinds of text as there are experts, float64 [experts, m]: each kind gives
        1 in all."""
        if self._by_kind is None:
            worth = loss_share(self._block, self._text(), self._kinds(), self._division.experts, self._where)
            self._by_kind = worth / worth.sum(1, keepdim=True).clamp(min=1e-300)
        return self._by_kind

    def use_by_kind(self) -> torch.Tensor:
        """How much kinds of text use neurons, float64 [experts, m]."""
        return mean_activity(self._block, self._text(), self._kinds(), self._division.experts)

    def _kinds(self) -> torch.Tensor:
        return text_clusters(self._text(), self._division.experts, self._generator, self._where)

    def sharing(self) -> torch.Tensor:
        """Scores [m]; neurons with the largest ones are shared."""
        match self._division.shared_by:
            case SharedBy.COLUMNS:
                return self._block.down.dense().square().sum(0)
            case SharedBy.ACTIVATION_RATE:
                return self.markers().sum(0)
            case SharedBy.GRADIENT:
                worth = self.by_kind()
                size = self._block.width // len(worth)
                wanted = torch.zeros_like(worth).scatter_(1, worth.topk(size, dim=1).indices, 1.0)
                # where as many kinds want two neurons, the one that is worth more
                return wanted.sum(0) + worth.mean(0).clamp(max=0.5)


def _first(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Places int64 [count] of the largest scores; ties go to the lower index."""
    return torch.sort(scores, descending=True, stable=True).indices[:count]
