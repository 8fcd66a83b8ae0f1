"""Matrices that share a factor: the best common right or left one (Mixture of Latent Experts, arXiv 2503.23100)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moec.passes.factoring.decomposition import decompose, principal, require_finite
from moec.passes.factoring.whitening import Whitening, pooled

# Weight of the common norm beside a matrix's own.
_PRIOR = 1e-8


@dataclass(frozen=True)
class JointFactors:
    """Matrix i is left[i] [out, r] @ right[i] [r, in]; on one of the sides all are the same tensor."""

    left: tuple[torch.Tensor, ...]
    right: tuple[torch.Tensor, ...]


def share_right(weights: Sequence[torch.Tensor], norms: Sequence[Whitening], rank: int) -> JointFactors:
    """W_i ~ A_i B: one input projection B [r, in].

    B spans the best row space of all w_i W_i S, one below the other, where S S^T is the sum M of the second moments and
    w_i^2 the share that the rows of i have in it. So second moments that differ in scale alone give the optimum, by
    truncated singular value decomposition. Each A_i is then the least squares fit in the norm of its own rows, and of
    M's in the directions that these do not have.
    """
    common = pooled(norms)
    _, vectors = principal(_input_gram(weights, norms, common))
    right = vectors[:, :rank].T @ common.inverse
    left = [_fit_left(w.to(torch.float64), right, norm, common) for w, norm in zip(weights, norms, strict=True)]
    return JointFactors(tuple(left), (right,) * len(left))


def share_left(weights: Sequence[torch.Tensor], norms: Sequence[Whitening], rank: int) -> JointFactors:
    """W_i ~ B A_i: one output projection B [out, r].

    B are the first left singular vectors of all W_i S_i side by side and A_i = B^T W_i, optimal for any norms.
    """
    _, vectors = principal(_output_gram(weights, norms))
    left = vectors[:, :rank]
    return JointFactors((left,) * len(weights), tuple(left.T @ weight.to(torch.float64) for weight in weights))


def reduce_each(weights: Sequence[torch.Tensor], norms: Sequence[Whitening], rank: int) -> list[torch.Tensor]:
    """Every matrix at rank `rank` by itself: the first of the two phases of the paper."""
    return [decompose(w, norm).factors(rank).product() for w, norm in zip(weights, norms, strict=True)]


def joint_spectrum(weights: Sequence[torch.Tensor], norms: Sequence[Whitening], *, right: bool) -> torch.Tensor:
    """The singular values, descending, that `share_right` (if `right`) or `share_left` cuts."""
    gram = _input_gram(weights, norms, pooled(norms)) if right else _output_gram(weights, norms)
    return principal(gram)[0]


def _input_gram(weights: Sequence[torch.Tensor], norms: Sequence[Whitening], common: Whitening) -> torch.Tensor:
    """S (sum of w_i^2 W_i^T W_i) S."""
    total = torch.zeros_like(common.moment)
    for weight, norm in zip(weights, norms, strict=True):
        require_finite(weight)
        wide = weight.to(torch.float64)
        total += wide.T @ wide * (norm.trace * len(norms) / common.trace)
    return common.root @ total @ common.root


def _output_gram(weights: Sequence[torch.Tensor], norms: Sequence[Whitening]) -> torch.Tensor:
    """Sum of W_i M_i W_i^T."""
    total = torch.zeros(weights[0].shape[0], weights[0].shape[0], dtype=torch.float64)
    for weight, norm in zip(weights, norms, strict=True):
        require_finite(weight)
        wide = weight.to(torch.float64)
        total += wide @ norm.moment @ wide.T
    return total


def _fit_left(weight: torch.Tensor, right: torch.Tensor, norm: Whitening, common: Whitening) -> torch.Tensor:
    """The A [out, r] that minimises ||(W - A right) S||_F; right M right^T is the identity."""
    moment = norm.moment + common.moment * (_PRIOR * norm.trace / common.trace)
    reached = right @ moment
    fitted: torch.Tensor = torch.linalg.solve(reached @ right.T, reached @ weight.T).T
    return fitted
