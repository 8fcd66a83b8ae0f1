"""Codes in bytes: rows apart, lowest bit first."""

from __future__ import annotations

import numpy as np
import torch

_TRITS_PER_BYTE = 5


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """u8 [..., ceil(K * bits / 8)] of integer codes [..., K] below 2^bits, 1 to 16 bits; the last bits are zero."""
    if bits == 8:
        return codes.to(torch.uint8)
    if 8 % bits == 0:
        return _pack_whole(codes.to(torch.uint8), bits)
    wide = codes.to(torch.int32).numpy().astype("<u2")
    expanded = np.unpackbits(wide[..., None].view(np.uint8), axis=-1, bitorder="little")[..., :bits]
    return torch.from_numpy(np.packbits(expanded.reshape(*wide.shape[:-1], -1), axis=-1, bitorder="little"))


def unpack_bits(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The codes [..., columns] that `pack_bits` packed: u8 up to 8 bits, int32 above."""
    if bits == 8:
        return packed[..., :columns]
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        split = (packed[..., None] >> shifts) & ((1 << bits) - 1)
        return split.flatten(-2)[..., :columns]
    expanded = np.unpackbits(packed.contiguous().numpy(), axis=-1, bitorder="little")[..., : columns * bits]
    single = expanded.reshape(*packed.shape[:-1], columns, bits)
    joined = np.packbits(single, axis=-1, bitorder="little")
    if bits < 8:
        return torch.from_numpy(np.ascontiguousarray(joined[..., 0]))
    return torch.from_numpy(np.ascontiguousarray(joined).view("<u2")[..., 0].astype(np.int32))


def _pack_whole(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes that do not straddle bytes."""
    each = 8 // bits
    missing = -codes.shape[-1] % each
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (split_last(codes, each) << shifts).sum(-1, dtype=torch.uint8)


def split_last(values: torch.Tensor, size: int) -> torch.Tensor:
    """[..., n] as [..., n / size, size]."""
    return values.reshape(*values.shape[:-1], -1, size)


def pack_trits(trits: torch.Tensor) -> torch.Tensor:
    """u8 [..., ceil(K / 5)] of trits [..., K] of 0, 1, 2: five digits to the base 3, the first one lowest."""
    missing = -trits.shape[-1] % _TRITS_PER_BYTE
    padded = torch.nn.functional.pad(trits.to(torch.uint8), (0, missing))
    powers = torch.tensor([3**place for place in range(_TRITS_PER_BYTE)], dtype=torch.uint8)
    return (split_last(padded, _TRITS_PER_BYTE) * powers).sum(-1, dtype=torch.uint8)


def unpack_trits(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The trits [..., columns] that `pack_trits` packed, u8."""
    digits = torch.arange(_TRITS_PER_BYTE)
    table = torch.div(torch.arange(256)[:, None], 3**digits, rounding_mode="floor") % 3
    return table.to(torch.uint8)[packed.long()].flatten(-2)[..., :columns]
