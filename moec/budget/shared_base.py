"""Experts as a mean that their layer stores once, and what each is beyond it at low rank (D2-MoE, section 3.8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moec.experts import Dense, FeedForward, LowRank, MoeLayer, load_expert
from moec.passes.factoring.decomposition import Decomposition, decompose, rank_for_parameters, saves
from moec.passes.factoring.sides import Norms, Side, dense_matrix, projection, with_matrices
from moec.weights.context import WeightContext

LEAST_EXPLAINED = 0.3
"""A mean that holds less of the squared weights of the experts is of no use to them: they are unrelated."""


@dataclass(frozen=True)
class SharedBase:
    """The mean of the experts of a layer, weighted by how many tokens chose them; float32 by side."""

    matrices: Mapping[Side, torch.Tensor]
    members: frozenset[int]

    @property
    def elements(self) -> int:
        """Numbers in all matrices."""
        return sum(matrix.numel() for matrix in self.matrices.values())

    def differences(self, expert: FeedForward, number: int, norms: Norms) -> Differences:
        """What a member is beyond the mean, decomposed."""
        found = {
            side: decompose(dense_matrix(expert, side) - matrix, norms.of(number, expert, side))
            for side, matrix in self.matrices.items()
        }
        return Differences(expert, self, found)


@dataclass(frozen=True)
class Differences:
    """One expert's differences from the mean, to be cut at a rank."""

    expert: FeedForward
    base: SharedBase
    sides: Mapping[Side, Decomposition]

    def at(self, rank: int) -> FeedForward:
        """The expert as the mean and factors of that rank."""
        matrices = {}
        for side, decomposition in self.sides.items():
            factors = decomposition.factors(rank)
            base = self.base.matrices[side]
            matrices[side] = LowRank(factors.left.float(), factors.right.float(), base=base)
        return with_matrices(self.expert, matrices)


def shared_base(layer: MoeLayer, weights: WeightContext, count: torch.Tensor) -> SharedBase | None:
    """The mean of the dense experts of a layer that are not protected; `count` [E] tokens chose each.

    None where there are fewer than two, where they differ in size, or where the mean explains too little of them.
    """
    sums: dict[Side, torch.Tensor] = {}
    squares, total = 0.0, 0.0
    members = []
    for number in range(layer.expert_count):
        expert = load_expert(layer, weights, number)
        if number in layer.protected or not isinstance(expert, FeedForward):
            continue
        sides = {side: item for side in Side if (item := projection(expert, side)) is not None}
        shapes = {side: item.matrix.shape for side, item in sides.items()}
        if not all(isinstance(item.matrix, Dense) for item in sides.values()):
            continue
        if sums and shapes != {side: tuple(matrix.shape) for side, matrix in sums.items()}:
            return None
        weight = float(count[number]) + 1.0
        for side in sides:
            matrix = dense_matrix(expert, side).double()
            sums[side] = sums.get(side, torch.zeros_like(matrix)) + weight * matrix
            squares += weight * float(matrix.square().sum())
        total += weight
        members.append(number)
    if len(members) < 2:
        return None
    means = {side: matrix / total for side, matrix in sums.items()}
    explained = total * sum(float(matrix.square().sum()) for matrix in means.values()) / max(squares, 1e-300)
    if explained < LEAST_EXPLAINED:
        return None
    return SharedBase({side: matrix.float() for side, matrix in means.items()}, frozenset(members))


def ranks_of(shares: tuple[float, ...], shape: tuple[int, int]) -> list[int]:
    """The distinct ranks whose factors hold at most these shares of a matrix's parameters, and fewer than all."""
    least, size = sum(shape), shape[0] * shape[1]
    ranks = {rank_for_parameters(share * size, *shape) for share in shares if share * size >= least}
    return sorted(rank for rank in ranks if saves(rank, *shape))
