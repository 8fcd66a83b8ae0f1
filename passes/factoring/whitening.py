"""Square roots of second moments: the norm in which an error of a weight is an error of what the weight computes.

For rows x with H = sum of x x^T, ||x (W - W')^T|| over all rows is ||(W - W') S||_F with S S^T = H.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from moec.errors import UsageError

# Eigenvalues below this share of the greatest one are rounding, of either sign.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Whitening:
    """S [n, n] with S S^T the damped second moment, by its eigenvectors [n, n] and the roots [n] of its eigenvalues.

    Float64. All roots are positive, so S has an inverse whatever rows there were.
    """

    vectors: torch.Tensor
    roots: torch.Tensor

    @cached_property
    def root(self) -> torch.Tensor:
        """S, symmetric."""
        return (self.vectors * self.roots) @ self.vectors.T

    @cached_property
    def inverse(self) -> torch.Tensor:
        """S^-1."""
        return (self.vectors / self.roots) @ self.vectors.T

    @cached_property
    def moment(self) -> torch.Tensor:
        """S S^T."""
        return (self.vectors * self.roots.square()) @ self.vectors.T

    def error(self, difference: torch.Tensor) -> float:
        """||difference S||_F^2 for a difference [out, n] of weights."""
        return float((difference.to(torch.float64) @ self.root).square().sum())


def plain(size: int, eigenvalue: float = 1.0) -> Whitening:
    """A multiple of the identity as the second moment: the error of a weight is its own Frobenius norm."""
    return Whitening(torch.eye(size, dtype=torch.float64), torch.full((size,), eigenvalue**0.5, dtype=torch.float64))


def pooled(norms: Sequence[Whitening]) -> Whitening:
    """The norm of the rows of all together: the sum of the second moments. One norm stays what it is."""
    if all(norm is norms[0] for norm in norms):
        return norms[0]
    return _positive_root(sum((norm.moment for norm in norms), torch.zeros_like(norms[0].moment)))


def average(norms: Sequence[Whitening]) -> Whitening:
    """The norm of as many rows as one of them has on average."""
    total = pooled(norms)
    return Whitening(total.vectors, total.roots / len(norms) ** 0.5)


def whitening(moment: torch.Tensor, damping: float = 0.0) -> Whitening | None:
    """The root of a second moment [n, n] plus `damping` times its mean eigenvalue; None where no row was seen.

    Directions without rows get the damping, or else a root at the level of rounding: they count little, not nothing.

    Raises:
        UsageError: the moment is not finite.
    """
    moment = moment.to(torch.float64)
    if not bool(torch.isfinite(moment).all()):
        raise UsageError(
            "the second moment of an expert's input is not finite",
            hint="a weight or an activation of the model is NaN or infinite; `moec verify` finds where",
        )
    # all of its elements are zero exactly when its diagonal is
    if not bool((moment.diagonal() > 0).any()):
        return None
    return _positive_root(moment, damping)


def _positive_root(moment: torch.Tensor, damping: float = 0.0) -> Whitening:
    eigenvalues, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    damped = eigenvalues.clamp_min(0) + damping * eigenvalues.clamp_min(0).mean()
    return Whitening(vectors, damped.clamp_min(float(eigenvalues[-1]) * _ROUNDING).sqrt())
