"""Least squares of down projections on calibration rows, towards what they are, with a held-out check."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def ridge_changes(features: torch.Tensor, residual: torch.Tensor, ridges: Sequence[float]) -> list[torch.Tensor]:
    """For each of `ridges` the change W [u, H] that minimises `|residual - features W|^2 + ridge * s * |W|^2`, float64.

    `features` [n, u], `residual` [n, H]; s is the mean over features of their summed squares, so that ridges have no
    unit. A change towards zero: where nothing is left to explain, or a feature never acts, nothing changes.
    """
    features, residual = features.double(), residual.double()
    gram, moments = features.T @ features, features.T @ residual
    scale = float(gram.diagonal().mean()) if len(gram) else 0.0
    if scale == 0.0:
        return [torch.zeros_like(moments) for _ in ridges]
    diagonal = gram.diagonal().clone()
    result = []
    for ridge in ridges:
        gram.diagonal().copy_(diagonal + ridge * scale)
        result.append(torch.cholesky_solve(moments, torch.linalg.cholesky(gram)))
    return result


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
