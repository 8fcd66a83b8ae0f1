"""Least squares of down projections on calibration rows, towards what they are, with a held-out check."""

from __future__ import annotations

import torch


def ridge_change(features: torch.Tensor, residual: torch.Tensor, ridge: float) -> torch.Tensor:
    """The change W [u, H] that minimises `|residual - features W|^2 + ridge * s * |W|^2` in float64.

    `features` [n, u], `residual` [n, H]; s is the mean square of a feature over the rows, summed, so that `ridge` has
    no unit. A change towards zero: where nothing is left to explain, or a feature never acts, nothing changes.
    """
    features, residual = features.double(), residual.double()
    gram = features.T @ features
    scale = float(gram.diagonal().mean()) if len(gram) else 0.0
    if scale == 0.0:
        return torch.zeros(features.shape[1], residual.shape[1], dtype=torch.float64)
    gram.diagonal().add_(ridge * scale)
    return torch.cholesky_solve(features.T @ residual, torch.linalg.cholesky(gram))


def mean_square(residual: torch.Tensor) -> float:
    """Mean over rows of the squared length."""
    return float(residual.double().square().sum(dim=1).mean())


def held_out_rows(sequence: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """bool [n]: the rows that a fit must not see. Whole sequences, because neighbouring tokens are alike.

    `sequence` i64 [n] says which sequence a row is from; with one sequence, its last rows are held out.
    """
    sequences, numbers = torch.unique(sequence, return_inverse=True)
    if len(sequences) == 1:
        return torch.arange(len(sequence)) >= round(len(sequence) * (1 - share))
    sizes = torch.bincount(numbers)
    order = torch.randperm(len(sequences), generator=generator)
    before = sizes[order].cumsum(0) - sizes[order]
    return torch.isin(numbers, order[before < share * len(sequence)])
