"""The values of published low-precision formats, as float32: DeepSeek-V3's float8 blocks and gpt-oss's MXFP4."""

from __future__ import annotations

import torch

_MXFP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MXFP4_EXPONENT_BIAS = 127


def dequantize_fp8_block(
    weight: torch.Tensor, scale: torch.Tensor, row_blocks: torch.Tensor, column_blocks: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """`weight[..., r, c] * scale[..., row_blocks[r], column_blocks[c]]` into `out`, float32 [..., rows, columns].

    weight: float8 [..., rows, columns]; scale: any float type [..., row blocks, column blocks], multiplied as float32;
    row_blocks, column_blocks: int64, for each row and column the block it belongs to.
    Source: DeepSeek-V3 technical report (arXiv:2412.19437) section 3.3.2; `weight_scale_inv` is the multiplier.
    """
    scale = scale.to(torch.float32)
    # One block of rows after the other, so that nothing of the size of the whole weight is needed beside `out`.
    blocks, counts = torch.unique_consecutive(row_blocks, return_counts=True)
    start = 0
    for block, count in zip(blocks.tolist(), counts.tolist(), strict=True):
        factors = scale[..., block, :].index_select(-1, column_blocks)
        values = weight[..., start : start + count, :].to(torch.float32)
        torch.mul(values, factors.unsqueeze(-2), out=out[..., start : start + count, :])
        start += count
    return out


def dequantize_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [..., groups * bytes * 2] from uint8 blocks [..., groups, bytes] and uint8 scales [..., groups].

    Each byte holds two E2M1 floats, the low half first; a group's values are multiplied by 2 ** (scale - 127).
    Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3 and 5.4.1.
    """
    table = torch.tensor([*_MXFP4_VALUES, *(-value for value in _MXFP4_VALUES)], dtype=torch.float32)
    values = torch.empty(*blocks.shape, 2, dtype=torch.float32)
    values[..., 0] = table[(blocks & 0x0F).to(torch.int32)]
    values[..., 1] = table[(blocks >> 4).to(torch.int32)]
    exponents = scales.to(torch.int32) - _MXFP4_EXPONENT_BIAS
    values = torch.ldexp(values, exponents[..., None, None])
    return values.reshape(*blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1] * 2)
