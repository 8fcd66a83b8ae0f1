"""Ridge regression of what an expert computes on its input, reduced to a rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Penalties that are tried, as shares of the mean eigenvalue of the inputs' second moment.
_PENALTIES = tuple(10.0**power for power in range(-6, 4))
# A row that alone decides its own fit has no freedom left, but for rounding.
_LEAST_FREEDOM = 1e-9


@dataclass(frozen=True)
class AffineMap:
    """x -> x right^T left^T + bias: left [out, r], right [r, in], bias [out]; r = 0 is a constant."""

    left: torch.Tensor
    right: torch.Tensor
    bias: torch.Tensor

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """[n, out]."""
        return x @ self.right.T @ self.left.T + self.bias


def fit_constant(targets: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """The mean [out] of targets [n, out] by importance [n]."""
    return (importance[:, None] * targets).sum(0) / importance.sum()


def fit_affine(x: torch.Tensor, targets: torch.Tensor, importance: torch.Tensor, rank: int) -> AffineMap:
    """The affine map of rank `rank` that fits targets [n, out] on x [n, in], errors squared times importance [n].

    Ridge regression on centred rows, with the penalty of the least leave-one-out error; then the fitted values are
    projected on their first `rank` principal directions (reduced-rank regression; Izenman 1975). The bias is free of
    both. Float64.
    """
    x, targets, importance = x.to(torch.float64), targets.to(torch.float64), importance.to(torch.float64)
    center, bias = fit_constant(x, importance), fit_constant(targets, importance)
    scale = importance.sqrt()[:, None]
    rows, wanted = (x - center) * scale, (targets - bias) * scale
    left, singular, right = torch.linalg.svd(rows, full_matrices=False)
    projected = left.T @ wanted
    penalty = _best_penalty(left, singular, projected, wanted, importance / importance.sum())
    shrunk = _shrunk(singular, penalty)
    fitted_by_direction = shrunk[:, None] * projected
    rank = min(rank, *fitted_by_direction.shape)
    # the fitted values are left @ fitted_by_direction, so these are their principal directions
    directions = torch.linalg.svd(fitted_by_direction, full_matrices=False).Vh[:rank]
    inverse = torch.where(singular > 0, shrunk / singular.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    coefficients = right.T @ (inverse[:, None] * projected)
    reduced = coefficients @ directions.T
    return AffineMap(directions.T, reduced.T, bias - directions.T @ (reduced.T @ center))


def _shrunk(singular: torch.Tensor, penalty: float) -> torch.Tensor:
    """s^2 / (s^2 + penalty), and 0 for s = 0."""
    squares = singular.square()
    return torch.where(squares > 0, squares / (squares + penalty).clamp_min(torch.finfo(torch.float64).tiny), 0.0)


def _best_penalty(
    left: torch.Tensor, singular: torch.Tensor, projected: torch.Tensor, wanted: torch.Tensor, share: torch.Tensor
) -> float:
    """The penalty whose errors, each row left out in turn, are least; the greater of equal ones.

    `share` [n] is each row's part in the means that were taken off, which it loses with the row.
    """
    scale = float(singular.square().mean())
    best, least = _PENALTIES[-1] * scale, float("inf")
    for candidate in reversed(_PENALTIES):
        shrunk = _shrunk(singular, candidate * scale)
        residual = wanted - left @ (shrunk[:, None] * projected)
        leverage = (left.square() * shrunk).sum(1) + share
        error = float((residual / (1 - leverage).clamp_min(_LEAST_FREEDOM)[:, None]).square().sum())
        if error < least:
            best, least = candidate * scale, error
    return best
