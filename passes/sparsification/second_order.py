"""Pruning of a matrix by second order: weights that stay make up for those that go (SparseGPT, arXiv 2301.00774)."""

from __future__ import annotations

from collections.abc import Callable

import torch

_PART_COLUMNS = 128
"""Columns whose errors reach the later ones in one product."""

Chooser = Callable[[torch.Tensor], torch.Tensor]
"""Scores [out, columns] of some neighbouring columns to the mask of the weights that stay."""


def prune_second_order(
    weight: torch.Tensor, moment: torch.Tensor, choose: Chooser, block: int, *, damping: float = 0.01
) -> torch.Tensor:
    """`weight` [out, in] with zeros, close to it in ‖(W - W') X‖² for `moment` [in, in] = Σ x xᵀ; float64 inside.

    Masks are chosen for `block` columns at a time, by w² / [H⁻¹]ⱼⱼ of the columns not yet done, and the error of each
    column is spread over the later ones (optimal brain surgeon with a fixed order of columns). `damping` of the mean of
    the diagonal is added to it; a moment of zeros counts as the identity, which makes this magnitude pruning.
    """
    result = weight.to(torch.float64).clone()
    columns = result.shape[1]
    hessian = moment.to(torch.float64).clone()
    mean = float(hessian.diagonal().mean())
    hessian.diagonal().add_(damping * mean if mean > 0 else 1.0)
    # row j of the upper Cholesky factor of H⁻¹ holds what column j's error does to the later columns
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    part = max(_PART_COLUMNS // block, 1) * block
    for start in range(0, columns, part):
        end = min(start + part, columns)
        errors = torch.zeros_like(result[:, start:end])
        mask = torch.empty_like(errors, dtype=torch.bool)
        for column in range(start, end):
            if (column - start) % block == 0:
                ahead = slice(column, min(column + block, end))
                mask[:, column - start : ahead.stop - start] = choose(
                    result[:, ahead].square() / factor.diagonal()[ahead].square()
                )
            pruned = torch.where(mask[:, column - start], result[:, column], 0.0)
            error = (result[:, column] - pruned) / factor[column, column]
            result[:, column:end] -= error[:, None] * factor[column, column:end]
            result[:, column] = pruned
            errors[:, column - start] = error
        result[:, end:] -= errors @ factor[start:end, end:]
    return result.to(weight.dtype)
