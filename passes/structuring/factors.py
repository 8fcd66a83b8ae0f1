"""The structured factors nearest to a matrix in Frobenius norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Factors:
    """A matrix [out, in] as left times right, float64.

    `right` [b, q', in / b] multiplies each of b blocks of inputs. `left` [c, p, s] multiplies each of c groups of what
    that gives: with c = 1 all of it, [out, b q']; else the group j takes the j-th q' / c numbers of every block, and
    gives the j-th out / c outputs.
    """

    left: torch.Tensor
    right: torch.Tensor
    text: str

    @property
    def numel(self) -> int:
        """The numbers of both."""
        return self.left.numel() + self.right.numel()

    def product(self) -> torch.Tensor:
        """The matrix [out, in]."""
        blocks, inner, inputs = self.right.shape
        groups, outputs, _ = self.left.shape
        left = self.left.reshape(groups, outputs, blocks, inner // groups)
        right = self.right.reshape(blocks, groups, inner // groups, inputs)
        return torch.einsum("gobr,bgri->gobi", left, right).reshape(groups * outputs, blocks * inputs)


def low_rank(matrix: torch.Tensor, rank: int) -> Factors:
    """[out, rank] [rank, in] with the largest singular values, halved between the two."""
    left, right = _cut(matrix, rank)
    return Factors(left[None], right[None], f"rank {rank}")


def block_dense(matrix: torch.Tensor, blocks: int, rank: int) -> Factors:
    """[out, blocks * rank] times a block-diagonal matrix: each block of inputs at a rank of its own."""
    parts = [_cut(part, rank) for part in matrix.chunk(blocks, dim=1)]
    text = f"{blocks} blocks of rank {rank}"
    return Factors(
        torch.cat([left for left, _ in parts], dim=1)[None], torch.stack([right for _, right in parts]), text
    )


def block_shuffle(matrix: torch.Tensor, blocks: int, rank: int) -> Factors:
    """Block-diagonal, permutation, block-diagonal: each of blocks^2 parts of the matrix at a rank."""
    outputs, inputs = matrix.shape
    grid = matrix.reshape(blocks, outputs // blocks, blocks, inputs // blocks).permute(0, 2, 1, 3)
    left, singular, right = torch.linalg.svd(grid, full_matrices=False)
    root = singular[..., :rank].sqrt()
    left = left[..., :rank] * root[..., None, :]
    right = right[..., :rank, :] * root[..., None]
    # [group, block, out / groups, r] to [group, out / groups, block * r]
    joined = left.permute(0, 2, 1, 3).reshape(blocks, outputs // blocks, blocks * rank)
    # [group, block, r, in / blocks] to [block, group * r, in / blocks]
    inner = right.permute(1, 0, 2, 3).reshape(blocks, blocks * rank, inputs // blocks)
    return Factors(joined, inner, f"{blocks} x {blocks} parts of rank {rank}")


def _cut(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    root = singular[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]
