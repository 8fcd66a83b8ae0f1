"""A matrix as signs of its largest entries times one number (ComPEFT)."""

from __future__ import annotations

import math

import torch

from moec.dialects.quant import Levels, Span, Ternary, TritPacking
from moec.quantization.packed import Packed, pack_codes


def largest_signs(difference: torch.Tensor, density: float) -> torch.Tensor:
    """int8 [N, K]: the signs of the largest entries, of the share `density`, rounded up, ties to the first; else 0."""
    flat = difference.flatten()
    count = min(math.ceil(density * flat.numel() - 1e-9), flat.numel())
    kept = torch.sort(flat.abs(), descending=True, stable=True).indices[:count]
    signs = torch.zeros(flat.numel(), dtype=torch.int8)
    signs[kept] = flat[kept].sign().to(torch.int8)
    return signs.reshape(difference.shape)


def least_squares_scale(difference: torch.Tensor, signs: torch.Tensor) -> float:
    """The number that signs are multiplied with for the least squared error: the mean size of the kept entries."""
    chosen = signs != 0
    count = int(chosen.sum())
    return float(difference[chosen].double().abs().sum()) / count if count else 0.0


def packed_signs(signs: torch.Tensor, scale: float) -> Packed:
    """The matrix scale * signs with five trits in a byte. Signs that are all zero have the scale 1."""
    kind = Ternary(Levels.SCALE, Span.TENSOR, packing=TritPacking.FIVE_PER_BYTE)
    # code 1 is the lower level, 2 the upper one
    codes = torch.where(signs < 0, 1, torch.where(signs > 0, 2, 0)).to(torch.uint8)
    number = scale if scale > 0 else 1.0
    if scale <= 0:
        codes = torch.zeros_like(codes)
    return Packed(kind, signs.shape[1], pack_codes(kind, codes), torch.tensor([[number]], dtype=torch.float32))
