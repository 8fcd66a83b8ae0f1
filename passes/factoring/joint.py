"""Matrices that share a factor: the best common right or left one (Mixture of Latent Experts, arXiv 2503.23100)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moec.passes.factoring.decomposition import Decomposition, decompose, require_finite
from moec.passes.factoring.whitening import Whitening, pooled


@dataclass(frozen=True)
class JointFactors:
    """Matrix i is left[i] [out, r] @ right[i] [r, in]; on one of the sides all are the same tensor."""

    left: tuple[torch.Tensor, ...]
    right: tuple[torch.Tensor, ...]


def share_right(weights: Sequence[torch.Tensor], norms: Sequence[Whitening], rank: int) -> JointFactors:
    """W_i ~ A_i B: one input projection B [r, in].

    B spans the best row space of all w_i W_i S, one below the other, where S S^T is the sum of the second moments and
    w_i^2 the share that the rows of i have in it. So second moments that differ in scale alone give the optimum, by
    truncated singular value decomposition. Each A_i is then the least squares fit in the norm of its own rows.
    """
    joint = _stacked(weights, norms)
    right = joint.right[:rank] @ joint.whitening.inverse
    left = [_fit_left(weight.to(torch.float64), right, norm) for weight, norm in zip(weights, norms, strict=True)]
    return JointFactors(tuple(left), (right,) * len(left))


def share_left(weights: Sequence[torch.Tensor], norms: Sequence[Whitening], rank: int) -> JointFactors:
    """W_i ~ B A_i: one output projection B [out, r].

    B are the first left singular vectors of all W_i S_i side by side and A_i = B^T W_i, optimal for any norms.
    """
    left = torch.linalg.svd(_side_by_side(weights, norms), full_matrices=False).U[:, :rank]
    return JointFactors((left,) * len(weights), tuple(left.T @ weight.to(torch.float64) for weight in weights))


def reduce_each(weights: Sequence[torch.Tensor], norms: Sequence[Whitening], rank: int) -> list[torch.Tensor]:
    """Every matrix at rank `rank` by itself: the first of the two phases of the paper."""
    return [decompose(w, norm).factors(rank).product() for w, norm in zip(weights, norms, strict=True)]


def joint_spectrum(weights: Sequence[torch.Tensor], norms: Sequence[Whitening], *, right: bool) -> torch.Tensor:
    """The singular values, descending, that `share_right` (if `right`) or `share_left` cuts."""
    if right:
        return _stacked(weights, norms).singular
    singular: torch.Tensor = torch.linalg.svdvals(_side_by_side(weights, norms))
    return singular


def _stacked(weights: Sequence[torch.Tensor], norms: Sequence[Whitening]) -> Decomposition:
    pieces = [weight.to(torch.float64) * scale for weight, scale in zip(weights, _scales(norms), strict=True)]
    return decompose(torch.cat(pieces), pooled(norms))


def _side_by_side(weights: Sequence[torch.Tensor], norms: Sequence[Whitening]) -> torch.Tensor:
    for weight in weights:
        require_finite(weight)
    return torch.cat([w.to(torch.float64) @ norm.root for w, norm in zip(weights, norms, strict=True)], dim=1)


def _scales(norms: Sequence[Whitening]) -> list[float]:
    """Roots of the traces of the second moments, divided by their mean."""
    traces = torch.stack([norm.roots.square().sum() for norm in norms])
    scales: list[float] = (traces / traces.mean()).sqrt().tolist()
    return scales


def _fit_left(weight: torch.Tensor, right: torch.Tensor, norm: Whitening) -> torch.Tensor:
    """The A [out, r] that minimises ||(W - A right) S||_F."""
    whitened = right @ norm.root
    fitted: torch.Tensor = torch.linalg.lstsq(whitened.T, (weight @ norm.root).T, driver="gelsd").solution.T
    return fitted
