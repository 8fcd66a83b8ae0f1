"""Experts of which some neurons stay whole while the others are factored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from moec.experts import Dense, FeedForward, LowRank, PartlyLowRank, Projection
from moec.passes.factoring.decomposition import Decomposition, RankRule
from moec.passes.factoring.sides import Side, projection, with_matrices
from moec.passes.factoring.whitening import Whitening, plain, whitening


@dataclass(frozen=True)
class Parts:
    """A matrix as the part `whole` of the neurons that stay and the `rest`, with the norm of the rest's rows."""

    whole: torch.Tensor
    rest: torch.Tensor
    norm: Whitening
    axis: int

    def joined(self, factors: LowRank) -> PartlyLowRank:
        """The matrix with factors for the rest."""
        return PartlyLowRank(self.whole.contiguous(), factors, self.axis)


def neurons_to_keep(found: Mapping[Side, Decomposition], rule: RankRule, share: float) -> list[int]:
    """The neurons, ascending, that lose most at the rank of `rule`, as a share of what all neurons lose.

    A neuron is a row of gate and up and a column of down; the losses of the matrices add as shares of each matrix's
    squared norm. At least one neuron.
    """
    losses: list[torch.Tensor] = []
    for side, decomposition in found.items():
        residual, norm = decomposition.residual(rule.of(decomposition)), decomposition.norm
        if side is Side.DOWN:
            loss = residual.square().sum(0) * norm.moment.diagonal()
        else:
            loss = norm.errors_by_output(residual)
        energy = decomposition.singular.square().sum()
        losses.append(loss / energy if energy > 0 else loss)
    total = torch.stack(losses).sum(0)
    count = max(1, round(share * len(total)))
    chosen: list[int] = total.argsort(descending=True, stable=True)[:count].tolist()
    return sorted(chosen)


def ordered(expert: FeedForward, first: list[int]) -> tuple[FeedForward, torch.Tensor]:
    """The expert with the neurons `first` in front, and the order of its neurons; it computes the same."""
    rest = sorted(set(range(expert.width)) - set(first))
    order = torch.tensor([*first, *rest])
    moved = with_matrices(
        expert,
        {
            side: Dense(matrix.dense()[:, order] if side is Side.DOWN else matrix.dense()[order])
            for side in Side
            if (matrix := projection(expert, side)) is not None
        },
    )
    return replace(
        moved,
        gate=None if moved.gate is None else _reordered(moved.gate, order),
        up=_reordered(moved.up, order),
    ), order


def parts(matrix: torch.Tensor, norm: Whitening, order: torch.Tensor, kept: int, side: Side) -> Parts:
    """An ordered matrix [out, in] cut behind its first `kept` neurons; `norm` is that of the rows before ordering."""
    if side is not Side.DOWN:
        return Parts(matrix[:kept], matrix[kept:], norm, 0)
    others = order[kept:]
    # neurons that never fire have no norm of their own
    inner = whitening(norm.moment[others][:, others]) or plain(len(others))
    return Parts(matrix[:, :kept], matrix[:, kept:], inner, 1)


def _reordered(item: Projection, order: torch.Tensor) -> Projection:
    return item if item.bias is None else replace(item, bias=item.bias[order])
