"""Masks over the weights of a matrix: n of m in each block of a row, a share of each row, or all above a threshold."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moec.errors import VerificationError


@dataclass(frozen=True)
class BlockPattern:
    """At most `kept` of each `block` neighbouring weights of a row may be nonzero."""

    kept: int
    block: int

    @classmethod
    def parse(cls, text: str) -> BlockPattern:
        """`2:4` as a pattern; raises ValueError where the text is none."""
        kept, colon, block = text.partition(":")
        if not (colon and kept.isdigit() and block.isdigit() and 0 < int(kept) <= int(block)):
            raise ValueError(f"{text!r} is no pattern n:m with 0 < n <= m")
        return cls(int(kept), int(block))

    def __str__(self) -> str:
        return f"{self.kept}:{self.block}"

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """The `kept` best weights of each block, bool [out, in], of equal ones those with the lower column."""
        rows, columns = scores.shape
        blocks = scores.reshape(rows, columns // self.block, self.block)
        best = torch.sort(blocks, dim=-1, descending=True, stable=True).indices[..., : self.kept]
        return torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, best, True).reshape(rows, columns)

    def require(self, weight: torch.Tensor, where: str) -> None:
        """Raises VerificationError where a block of `weight` [out, in] has more nonzero weights than allowed."""
        blocks = weight.reshape(weight.shape[0], -1, self.block)
        most = int((blocks != 0).sum(-1).amax()) if blocks.numel() else 0
        if most > self.kept:
            raise VerificationError(f"a block has {most} nonzero weights, but the pattern is {self}", where=where)


def row_mask(scores: torch.Tensor, ratio: float) -> torch.Tensor:
    """All but the floor(ratio * in) lowest weights of each row, bool [out, in]; of equal ones the first stay."""
    columns = scores.shape[1]
    kept = columns - int(ratio * columns + 1e-9)
    best = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :kept]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
