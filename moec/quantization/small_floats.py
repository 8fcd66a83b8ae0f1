"""Small floating-point numbers and scales of the OCP Microscaling specification, as codes."""

from __future__ import annotations

from functools import cache

import torch

from moec.dialects.quant import BlockScale, Element

E8M0_BIAS = 127


@cache
def element_values(element: Element) -> torch.Tensor:
    """The number of each code, float32 [2^bits]: sign, exponent, fraction from the highest bit down; NaN has none."""
    if element is Element.E2M1:
        positive = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        return torch.cat([positive, -positive])
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


@cache
def scale_values(scale: BlockScale) -> torch.Tensor:
    """The number of each byte, float32 [256]; NaN where it is none."""
    if scale is BlockScale.E8M0:
        values = torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - E8M0_BIAS).float()
        values[255] = torch.nan
        return values
    return element_values(Element.E4M3)


def nearest_elements(values: torch.Tensor, element: Element) -> torch.Tensor:
    """Codes u8 of the nearest elements, ties to the even code; what is too large becomes the largest."""
    table = element_values(element).double()
    finite = table[: len(table) // 2]
    finite = finite[finite.isfinite()]
    size = values.double().abs().clamp_max(float(finite[-1]))
    upper = torch.searchsorted(finite, size).clamp(1, len(finite) - 1)
    below, above = size - finite[upper - 1], finite[upper] - size
    up = (above < below) | ((above == below) & (upper % 2 == 0))
    codes = torch.where(up, upper, upper - 1)
    return torch.where(values < 0, codes + len(table) // 2, codes).to(torch.uint8)
