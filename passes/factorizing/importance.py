"""What neurons are worth to kinds of text: by how active they are, or by what the loss would lose (LLaMA-MoE)."""

from __future__ import annotations

import torch

from moec.errors import UsageError
from moec.experts import FeedForward
from moec.passes.factorizing.activity import CHUNK_ROWS, Observed
from moec.passes.factorizing.partition import balanced_k_means, group_sizes


def text_clusters(observed: Observed, count: int, generator: torch.Generator, where: str) -> torch.Tensor:
    """A kind of text below `count` for each row, int64 [n]: its domain where there are as many domains, else the group
    of its sequence among equally large groups of sequences whose mean rows are alike.

    Raises UsageError where there are fewer sequences than kinds.
    """
    if len(torch.unique(observed.domain)) == count:
        return torch.searchsorted(torch.unique(observed.domain), observed.domain)
    names, place = torch.unique(observed.sequence, return_inverse=True)
    if len(names) < count:
        raise UsageError(
            f"{count} kinds of text cannot be told apart in {len(names)} sequences",
            where=where,
            hint=f"calibrate on {count} or more sequences, or on {count} texts",
        )
    means = torch.zeros(len(names), observed.x.shape[1])
    means.index_add_(0, place, observed.x.float())
    means = torch.nn.functional.normalize(means, dim=1)
    cluster = torch.empty(len(names), dtype=torch.int64)
    for number, members in enumerate(balanced_k_means(means, group_sizes(len(names), count), generator)):
        cluster[members] = number
    return cluster[place]


def mean_activity(block: FeedForward, observed: Observed, kind: torch.Tensor, count: int) -> torch.Tensor:
    """Mean |phi_i| over the rows of each kind of text, float64 [count, m] (Read-ME)."""
    return _mean_by_kind(block, observed.x, None, kind, count)


def loss_share(block: FeedForward, observed: Observed, kind: torch.Tensor, count: int, where: str) -> torch.Tensor:
    """Mean |phi_i dL/dphi_i| over the rows of each kind of text, float64 [count, m] (LLaMA-MoE, importance vectors).

    Raises UsageError where the calibration has no gradients.
    """
    return _mean_by_kind(block, observed.x, require_gradient(observed, where), kind, count)


def require_gradient(observed: Observed, where: str) -> torch.Tensor:
    """The derivative of the text's loss [n, H]; raises UsageError where the calibration has none."""
    if observed.gradient is None:
        raise UsageError("this needs gradients", where=where, hint="calibrate{gradients=true}")
    return observed.gradient


def _mean_by_kind(
    block: FeedForward, x: torch.Tensor, gradient: torch.Tensor | None, kind: torch.Tensor, count: int
) -> torch.Tensor:
    total = torch.zeros(count, block.width, dtype=torch.float64)
    down = block.down.dense()
    for start in range(0, len(x), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        strength = block.hidden_activations(x[rows].float())
        if gradient is not None:
            strength = strength * (gradient[rows].float() @ down)
        total.index_add_(0, kind[rows], strength.abs().double())
    return total / torch.bincount(kind, minlength=count).clamp(min=1)[:, None]
