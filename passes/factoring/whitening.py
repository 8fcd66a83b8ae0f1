"""Second moments as norms: in them an error of a weight is an error of what the weight computes.

For rows x with M = sum of x x^T, ||x (W - W')^T|| over all rows is ||(W - W') S||_F with S S^T = M.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from moec.errors import UsageError

# Eigenvalues below this share of the greatest one are rounding, of either sign.
_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class Whitening:
    """The norm of a second moment [n, n], float64, damped. Roots are computed when they are asked for."""

    moment: torch.Tensor

    @cached_property
    def root(self) -> torch.Tensor:
        """S, symmetric. It has an inverse: directions without rows count as much as rounding."""
        vectors, roots = self._eigen
        return (vectors * roots) @ vectors.T

    @cached_property
    def inverse(self) -> torch.Tensor:
        """S^-1."""
        vectors, roots = self._eigen
        return (vectors / roots) @ vectors.T

    @property
    def trace(self) -> float:
        """The sum of the squared lengths of the rows."""
        return float(self.moment.diagonal().sum())

    def error(self, difference: torch.Tensor) -> float:
        """||difference S||_F^2 for a difference [out, n] of weights."""
        return float(self.errors_by_output(difference).sum())

    def errors_by_output(self, difference: torch.Tensor) -> torch.Tensor:
        """The share [out] of each row of the difference in the error."""
        wide = difference.to(torch.float64)
        return ((wide @ self.moment) * wide).sum(1)

    @cached_property
    def _eigen(self) -> tuple[torch.Tensor, torch.Tensor]:
        eigenvalues, vectors = torch.linalg.eigh(self.moment)
        return vectors, eigenvalues.clamp_min(float(eigenvalues[-1]) * _ROUNDING).sqrt()


def plain(size: int, eigenvalue: float = 1.0) -> Whitening:
    """A multiple of the identity as the second moment: the error of a weight is its own Frobenius norm."""
    return Whitening(torch.eye(size, dtype=torch.float64) * eigenvalue)


def pooled(norms: Sequence[Whitening]) -> Whitening:
    """The norm of the rows of all together: the sum of the second moments."""
    return Whitening(sum((norm.moment for norm in norms), torch.zeros_like(norms[0].moment)))


def average(norms: Sequence[Whitening]) -> Whitening:
    """The norm of as many rows as one of them has on average."""
    return Whitening(pooled(norms).moment / len(norms))


def whitening(moment: torch.Tensor, damping: float = 0.0) -> Whitening | None:
    """The norm of a second moment [n, n] plus `damping` times its mean eigenvalue; None where no row was seen.

    Raises:
        UsageError: the moment is not finite.
    """
    moment = moment.to(torch.float64)
    if not bool(torch.isfinite(moment).all()):
        raise UsageError(
            "the second moment of an expert's input is not finite",
            hint="a weight or an activation of the model is NaN or infinite; `moec verify` finds where",
        )
    mean = float(moment.diagonal().mean())
    # all of its elements are zero exactly when its diagonal is
    if mean <= 0:
        return None
    symmetric = (moment + moment.T) / 2
    return Whitening(symmetric + damping * mean * torch.eye(len(moment), dtype=torch.float64))
