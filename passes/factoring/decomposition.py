"""A matrix as the product of two thin ones, at the rank that a rule gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch

from moec.errors import UsageError
from moec.passes.factoring.whitening import Whitening

# Singular values below this share of the greatest one are rounding.
_ROUNDING = 1e-7


class Split(Enum):
    """Which factor takes the singular values: both their square root, or one of them all."""

    SQRT = "sqrt"
    LEFT = "left"
    RIGHT = "right"


@dataclass(frozen=True)
class Factors:
    """left [out, r] @ right [r, in]."""

    left: torch.Tensor
    right: torch.Tensor

    def product(self) -> torch.Tensor:
        """[out, in]."""
        return self.left @ self.right


@dataclass(frozen=True)
class Decomposition:
    """The singular value decomposition W S = U diag(singular) V^T of a weight W [out, in] in a norm, float64.

    `left` [out, k] times `right` [k, in] is W, and their first r columns and rows the best product of rank r: U and
    U^T W, or W S V and V^T S^-1, whichever is smaller to compute. So `left` holds the singular values to the power
    `exponent`, 0 or 1, and at full rank nothing was divided by a small number.
    """

    left: torch.Tensor
    singular: torch.Tensor
    right: torch.Tensor
    exponent: int
    norm: Whitening

    def factors(self, rank: int, split: Split = Split.SQRT) -> Factors:
        """The best product of rank `rank` in the norm, with the singular values as `split` says."""
        kept = self.singular[:rank]
        # what is no more than rounding may lie on either side
        kept = torch.where(kept > _ROUNDING * self.singular[:1], kept, 1.0)
        share = {Split.SQRT: 0.5, Split.LEFT: 1.0, Split.RIGHT: 0.0}[split] - self.exponent
        return Factors(self.left[:, :rank] * kept.pow(share), self.right[:rank] * kept.pow(-share)[:, None])

    def residual(self, rank: int) -> torch.Tensor:
        """W less the best product of rank `rank`."""
        return self.left[:, rank:] @ self.right[rank:]

    def error(self, rank: int) -> float:
        """||(W - W_r) S||_F^2, from the singular values that are cut off."""
        return float(self.singular[rank:].square().sum())


def decompose(weight: torch.Tensor, norm: Whitening) -> Decomposition:
    """The decomposition of a weight [out, in] in the norm of rows.

    Raises:
        UsageError: the weight is not finite.
    """
    require_finite(weight)
    wide = weight.to(torch.float64)
    if wide.shape[0] <= wide.shape[1]:
        singular, vectors = principal(wide @ norm.moment @ wide.T)
        return Decomposition(vectors, singular, vectors.T @ wide, 0, norm)
    outputs = wide @ norm.root
    singular, vectors = principal(outputs.T @ outputs)
    return Decomposition(outputs @ vectors, singular, vectors.T @ norm.inverse, 1, norm)


def principal(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(roots of the eigenvalues [n], eigenvectors in columns [n, n]) of a Gram matrix, by falling eigenvalue."""
    eigenvalues, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return eigenvalues.flip(0).clamp_min(0).sqrt(), vectors.flip(1)


def require_finite(weight: torch.Tensor) -> None:
    """Raises UsageError where a weight holds NaN or infinity: no decomposition of it means anything."""
    if not bool(torch.isfinite(weight).all()):
        raise UsageError(
            "a weight of an expert is NaN or infinite",
            hint="repair the checkpoint, or leave the expert out with prune-experts",
        )


@dataclass(frozen=True)
class RankRule:
    """The rank of a matrix: a number, a share of its parameters, or a share of its energy. One of them is set."""

    rank: int | None = None
    ratio: float | None = None
    energy: float | None = None

    def problem(self) -> str | None:
        """What is wrong with the rule itself, whatever the matrix."""
        given = [value for value in (self.rank, self.ratio, self.energy) if value is not None]
        if len(given) != 1:
            return f"give one of rank, ratio and energy, not {len(given)} of them"
        if self.rank is not None and self.rank < 1:
            return f"rank {self.rank} is below 1"
        if self.ratio is not None and not 0 < self.ratio < 1:
            return f"ratio {self.ratio:g} is not within (0, 1); at 1 nothing would be saved"
        if self.energy is not None and not 0 < self.energy <= 1:
            return f"energy {self.energy:g} is not within (0, 1]"
        return None

    def of(self, decomposition: Decomposition, energy: float | None = None) -> int:
        """The rank for one matrix; shares of energy are of `energy`, by default that of the matrix itself.

        Raises:
            UsageError: above its full rank, or a ratio below that of rank 1.
        """
        outputs, inputs = decomposition.left.shape[0], decomposition.right.shape[1]
        if self.energy is not None:
            return rank_for_share(decomposition.singular, self.energy, energy)
        if self.ratio is not None:
            return rank_for_parameters(self.ratio * outputs * inputs, outputs, inputs)
        assert self.rank is not None
        require_rank(self.rank, outputs, inputs)
        return self.rank


def factored_size(rank: int, outputs: int, inputs: int) -> int:
    """Numbers in the two factors."""
    return rank * (outputs + inputs)


def saves(rank: int, outputs: int, inputs: int) -> bool:
    """Whether the factors hold fewer numbers than the matrix."""
    return factored_size(rank, outputs, inputs) < outputs * inputs


def rank_for_parameters(parameters: float, outputs: int, inputs: int) -> int:
    """The greatest rank whose factors hold at most so many numbers. Raises UsageError where rank 1 holds more."""
    # a share such as 0.3 is not exact in binary, and must not cost a rank
    rank = math.floor(parameters / (outputs + inputs) + 1e-9)
    if rank < 1:
        raise UsageError(
            f"{parameters:.0f} parameters are too few for factors of a {outputs}x{inputs} matrix",
            hint=f"rank 1 takes {outputs + inputs} of {outputs * inputs}",
        )
    return min(rank, outputs, inputs)


def require_rank(rank: int, outputs: int, inputs: int) -> None:
    """Raises UsageError for a rank above the full one."""
    if rank > min(outputs, inputs):
        raise UsageError(
            f"rank {rank} is above the full rank of a {outputs}x{inputs} matrix",
            hint=f"give a rank of at most {min(outputs, inputs)}",
        )


def rank_for_share(singular: torch.Tensor, share: float, total: float | None = None) -> int:
    """The least rank, at least 1, that loses at most 1 - share of `total`, by default the squared singular values."""
    squares = singular.square()
    whole = float(squares.sum()) if total is None else total
    lost = float(squares.sum()) - squares.cumsum(0)
    enough = lost <= (1 - share + 1e-12) * whole
    return int(enough.to(torch.int64).argmax()) + 1 if bool(enough.any()) else len(singular)
