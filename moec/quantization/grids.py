"""The codes of given numbers: how scales are fitted to weights, and which code is nearest.

A grid is fitted to values [..., n] that share one scale. So one call fits all groups of a matrix, and GPTQ fits one
group after the other on the matrix as it is by then. Scales are rounded to the type that they are stored in before
anything is measured by them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

import torch

from moec.dialects.quant import (
    BlockFloat,
    BlockScale,
    Codebook,
    Element,
    Format,
    Integer,
    Levels,
    Ternary,
    ZeroPoint,
)
from moec.errors import UsageError
from moec.quantization.packing import split_last
from moec.quantization.small_floats import E8M0_BIAS, element_values, nearest_elements, scale_values

_SHRINKS = tuple(1 - step / 100 for step in range(80))
_ERROR_POWER = 2.4


class TernaryFit(Enum):
    """How the levels of trits come from weights.

    ROW_MINMAX: the extremes (QMoE, arXiv 2310.16795). SYMMETRIC: the scale of least squared error. ABSMEAN: the mean
    absolute value (BitNet b1.58).
    """

    ROW_MINMAX = "row-minmax"
    SYMMETRIC = "symmetric"
    ABSMEAN = "absmean"


@dataclass(frozen=True)
class GridSettings:
    """What decides scales besides the format. `scale_dtype` is float32, float16 or bfloat16.

    `search`: shrink the range of integers to 1, .99, ... .21 of the extremes and keep what has the least sum of
    |error|^2.4 (GPTQ's option `mse`). `table` [entries, dim] float64 ascending, for codebooks; `tensor_scale` float32
    [1], for block scales of E4M3.
    """

    scale_dtype: torch.dtype = torch.float32
    search: bool = False
    ternary: TernaryFit = TernaryFit.ROW_MINMAX
    table: torch.Tensor | None = None
    tensor_scale: torch.Tensor | None = None


@dataclass(frozen=True)
class Grid:
    """Scales for values [..., n]: `scale` [..., 1] or, for extremes, [..., 2], as stored; of block floats their bytes.

    `zero` [..., 1]: the zero point, a code or a number.
    """

    format: Format
    settings: GridSettings
    scale: torch.Tensor
    zero: torch.Tensor | None = None

    def codes(self, values: torch.Tensor) -> torch.Tensor:
        """The code u8 of each value float64 [..., n]; for a codebook of several weights [..., n / dim]."""
        kind = self.format
        if isinstance(kind, Integer):
            return self.rounded(values)[0].to(torch.uint8)
        if isinstance(kind, Ternary):
            if kind.levels is Levels.EXTREMES:
                low, high = _extremes(self.scale)
                return torch.where(values > high / 2, 2, torch.where(values < low / 2, 1, 0)).to(torch.uint8)
            half = self.scale.double() / 2
            return torch.where(values > half, 2, torch.where(values < -half, 1, 0)).to(torch.uint8)
        if isinstance(kind, BlockFloat):
            scale = self._block_scale()
            return nearest_elements(values / torch.where(scale == 0, torch.inf, scale), kind.element)
        assert isinstance(kind, Codebook)
        return nearest_entries(values / self.scale.double(), self._table())

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The values float64 of codes."""
        kind = self.format
        if isinstance(kind, Integer):
            return (codes.double() - self._number_zero) * self._number_scale
        if isinstance(kind, Ternary):
            low, high = (
                _extremes(self.scale) if kind.levels is Levels.EXTREMES else (-self.scale.double(), self.scale.double())
            )
            return torch.where(codes == 2, high, torch.where(codes == 1, low, 0.0))
        if isinstance(kind, BlockFloat):
            return element_values(kind.element).double()[codes.long()] * self._block_scale()
        return self._table()[codes.long()].flatten(-2) * self.scale.double()

    def rounded(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes, of any type, and their values) for values float64 [..., n]: `codes` and `decode` in one."""
        if not isinstance(self.format, Integer):
            codes = self.codes(values)
            return codes, self.decode(codes)
        scale, zero = self._number_scale, self._number_zero
        codes = (values / scale).add_(zero).round_().clamp_(0, (1 << self.format.bits) - 1)
        return codes, (codes - zero).mul_(scale)

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Each value rounded to the grid."""
        return self.rounded(values)[1]

    @cached_property
    def _number_scale(self) -> torch.Tensor:
        return self.scale.double()

    @cached_property
    def _number_zero(self) -> torch.Tensor | float:
        assert isinstance(self.format, Integer)
        return self.format.middle if self.zero is None else self.zero.double()

    def _table(self) -> torch.Tensor:
        assert self.settings.table is not None
        return self.settings.table

    def _block_scale(self) -> torch.Tensor:
        assert isinstance(self.format, BlockFloat)
        scale = scale_values(self.format.scale).double()[self.scale.long()]
        tensor_scale = self.settings.tensor_scale
        return scale if tensor_scale is None else scale * tensor_scale.double()


def fit_grid(kind: Format, values: torch.Tensor, settings: GridSettings) -> Grid:
    """The grid of values float64 [..., n], finite, that share a scale.

    Raises UsageError where the scale is too large for its type.
    """
    if isinstance(kind, Integer):
        return _fit_integer(kind, values, settings)
    if isinstance(kind, Ternary):
        return _fit_ternary(kind, values, settings)
    if isinstance(kind, BlockFloat):
        return _fit_block(kind, values, settings)
    assert isinstance(kind, Codebook) and settings.table is not None
    largest = float(settings.table.abs().max()) or 1.0
    return Grid(kind, settings, _stored(values.abs().amax(-1, keepdim=True) / largest, settings))


def nearest_entries(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The code u8 of the nearest entry of `table` [entries, dim] for values [..., n], ties to the lower code."""
    if table.shape[1] == 1:
        borders = (table[1:, 0] + table[:-1, 0]) / 2
        return torch.bucketize(values.contiguous(), borders).to(torch.uint8)
    vectors = split_last(values, table.shape[1])
    distance = torch.cdist(vectors.flatten(0, -2), table)
    return distance.argmin(-1).reshape(vectors.shape[:-1]).to(torch.uint8)


def tensor_scale_of(kind: Format, values: torch.Tensor) -> torch.Tensor | None:
    """The scale float32 [1] of a whole matrix that E4M3 scales of blocks need, None for other formats."""
    if not isinstance(kind, BlockFloat) or kind.scale is not BlockScale.E4M3:
        return None
    largest = float(values.abs().max()) / (_largest(kind.element) * _largest(Element.E4M3))
    return torch.tensor([max(largest, torch.finfo(torch.float32).tiny)], dtype=torch.float32)


def _extremes(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(lowest, highest), each [..., 1] float64, of [..., 2]."""
    return scale[..., :1].double(), scale[..., 1:].double()


def _largest(element: Element) -> float:
    values = element_values(element)
    return float(values[values.isfinite()].max())


def _stored(scale: torch.Tensor, settings: GridSettings) -> torch.Tensor:
    """Scales in the type that they are stored in, above zero."""
    limits = torch.finfo(settings.scale_dtype)
    if bool((scale.abs() > limits.max).any()):
        raise UsageError(
            f"a scale of {float(scale.abs().max()):.3g} does not fit its type, which ends at {limits.max:.3g}",
            hint="store scales as f32 or bf16, or look for a damaged weight",
        )
    return scale.to(settings.scale_dtype).clamp_min(limits.tiny)


def _fit_integer(kind: Integer, values: torch.Tensor, settings: GridSettings) -> Grid:
    low = values.amin(-1, keepdim=True).clamp_max(0)
    high = values.amax(-1, keepdim=True).clamp_min(0)
    if kind.bits == 1 and kind.zero_point is ZeroPoint.MIDDLE:
        # the signs of weights, at their mean absolute value: the least squared error (XNOR-Net)
        return Grid(kind, settings, _stored(2 * values.abs().mean(-1, keepdim=True), settings))
    if kind.bits == 1 and kind.zero_point is ZeroPoint.FLOAT:
        # the same around the mean; equal weights have no spread
        mean = values.mean(-1, keepdim=True)
        spread = torch.maximum((values - mean).abs().mean(-1, keepdim=True), mean.abs() / 1024)
        scale = _stored(2 * spread, settings)
        return Grid(kind, settings, scale, (0.5 - mean / scale.double()).to(settings.scale_dtype))
    best = _integer_range(kind, low, high, settings)
    if not settings.search:
        return best
    least = _error(best, values)
    for shrink in _SHRINKS[1:]:
        tried = _integer_range(kind, low * shrink, high * shrink, settings)
        error = _error(tried, values)
        better = error < least
        least = torch.where(better, error, least)
        zero = None if best.zero is None or tried.zero is None else torch.where(better, tried.zero, best.zero)
        best = replace(best, scale=torch.where(better, tried.scale, best.scale), zero=zero)
    return best


def _integer_range(kind: Integer, low: torch.Tensor, high: torch.Tensor, settings: GridSettings) -> Grid:
    """The grid whose codes reach from `low` <= 0 to `high` >= 0 (GPTQ, Frantar et al. 2023)."""
    steps = (1 << kind.bits) - 1
    if kind.zero_point is ZeroPoint.MIDDLE:
        return Grid(kind, settings, _stored(2 * torch.maximum(-low, high) / steps, settings))
    empty = low == high
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    scale = _stored((high - low) / steps, settings)
    zero = -low / scale.double()
    if kind.zero_point is ZeroPoint.FLOAT:
        return Grid(kind, settings, scale, torch.where(empty, 0.0, zero).to(settings.scale_dtype))
    return Grid(kind, settings, scale, zero.round().clamp(0, steps))


def _error(grid: Grid, values: torch.Tensor) -> torch.Tensor:
    """[..., 1]; relative to the largest value, so that large ones do not overflow."""
    unit = values.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return ((grid.nearest(values) - values) / unit).abs().pow(_ERROR_POWER).sum(-1, keepdim=True)


def _fit_ternary(kind: Ternary, values: torch.Tensor, settings: GridSettings) -> Grid:
    if kind.levels is Levels.EXTREMES:
        extremes = torch.cat(
            [values.amin(-1, keepdim=True).clamp_max(0), values.amax(-1, keepdim=True).clamp_min(0)], -1
        )
        empty = (extremes == 0).all(-1, keepdim=True)
        extremes = torch.where(empty, torch.tensor([-1.0, 1.0], dtype=torch.float64), extremes)
        return Grid(kind, settings, _stored_extremes(extremes, settings))
    if settings.ternary is TernaryFit.ABSMEAN:
        return Grid(kind, settings, _stored(values.abs().mean(-1, keepdim=True), settings))
    # the scale of the m largest weights is their mean; what it explains of the squares is sum^2 / m
    sums = values.abs().sort(dim=-1, descending=True).values.cumsum(-1)
    counts = torch.arange(1, values.shape[-1] + 1, dtype=torch.float64)
    chosen = (sums / counts.sqrt()).argmax(-1, keepdim=True)
    return Grid(kind, settings, _stored(sums.gather(-1, chosen) / (chosen + 1), settings))


def _stored_extremes(extremes: torch.Tensor, settings: GridSettings) -> torch.Tensor:
    _stored(extremes.abs(), settings)
    return extremes.to(settings.scale_dtype)


def _fit_block(kind: BlockFloat, values: torch.Tensor, settings: GridSettings) -> Grid:
    largest = values.abs().amax(-1, keepdim=True)
    if kind.scale is BlockScale.E8M0:
        # the exponent of the largest weight, less that of the largest element
        exponent = torch.frexp(largest).exponent - 1 - (torch.frexp(torch.tensor(_largest(kind.element))).exponent - 1)
        biased = torch.where(largest == 0, 0, exponent + E8M0_BIAS)
        return Grid(kind, settings, biased.clamp(0, 254).to(torch.uint8))
    assert settings.tensor_scale is not None
    wanted = largest / _largest(kind.element) / settings.tensor_scale.double()
    return Grid(kind, settings, nearest_elements(wanted, Element.E4M3))
