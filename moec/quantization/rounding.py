"""Whole matrices in a format: each weight at its nearest code, and packing what another method chose."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from moec.dialects.quant import BlockFloat, Codebook, Format, Integer, Levels, Span, Ternary, ZeroPoint
from moec.errors import UnsafeInputError, UsageError
from moec.quantization.codebooks import fit_table
from moec.quantization.grids import Grid, GridSettings, fit_grid, tensor_scale_of
from moec.quantization.packed import Packed, groups_of, pack_codes
from moec.quantization.packing import pack_bits, split_last


@dataclass(frozen=True)
class Target:
    """A format and how numbers come into it. A codebook without a table gets one that fits the matrix."""

    format: Format
    settings: GridSettings = field(default_factory=GridSettings)

    def prepared(self, weight: torch.Tensor, where: str) -> Target:
        """With everything that is fitted to a whole matrix [N, K], float64.

        Raises UsageError where the format does not fit the matrix, UnsafeInputError where a weight is not finite.
        """
        if not bool(torch.isfinite(weight).all()):
            raise UnsafeInputError("a matrix holds NaN or infinity", where=where, hint="the checkpoint is broken")
        problem = self.format.problem(weight.shape[1])
        if problem is not None:
            raise UsageError(problem, where=where, hint=_hint(self.format, weight.shape[1]))
        settings = replace(self.settings, tensor_scale=tensor_scale_of(self.format, weight))
        if isinstance(self.format, Codebook) and settings.table is None:
            settings = replace(settings, table=fit_table(self.format, weight))
        return replace(self, settings=settings)


def round_matrix(target: Target, weight: torch.Tensor, where: str = "") -> Packed:
    """The matrix [N, K] with every weight at its nearest code; raises as `Target.prepared`."""
    weight = weight.double()
    target = target.prepared(weight, where)
    try:
        grids, codes = round_groups(target, weight)
    except UsageError as error:
        raise UsageError(error.message, where=where, hint=error.hint) from error
    return pack(target, weight.shape[1], grids, codes)


def round_groups(target: Target, weight: torch.Tensor) -> tuple[Grid, torch.Tensor]:
    """(grid with leading dimensions [R, G], codes [N, K / dim]) of a matrix float64 [N, K]."""
    kind = target.format
    if getattr(kind, "span", None) is Span.TENSOR:
        grid = fit_grid(kind, weight.reshape(1, 1, -1), target.settings)
        return grid, grid.codes(weight.reshape(1, 1, -1)).reshape(len(weight), -1)
    split = split_last(weight, groups_of(kind, weight.shape[1]))
    grid = fit_grid(kind, split, target.settings)
    return grid, grid.codes(split).flatten(1)


def pack(target: Target, columns: int, grid: Grid, codes: torch.Tensor) -> Packed:
    """The packed matrix of a grid with leading dimensions [R, G] and codes [N, K / dim]."""
    kind = target.format
    has_extremes = isinstance(kind, Ternary) and kind.levels is Levels.EXTREMES
    scale = grid.scale.flatten(1) if has_extremes else grid.scale[..., 0]
    zero_points = None
    if isinstance(kind, Integer) and kind.zero_point is not ZeroPoint.MIDDLE:
        assert grid.zero is not None
        zero = grid.zero[..., 0]
        zero_points = pack_bits(zero.to(torch.uint8), kind.bits) if kind.zero_point is ZeroPoint.INTEGER else zero
    table = target.settings.table
    return Packed(
        kind,
        columns,
        pack_codes(kind, codes).contiguous(),
        scale.contiguous(),
        None if zero_points is None else zero_points.contiguous(),
        table.float() if isinstance(kind, Codebook) and table is not None else None,
        None,
        target.settings.tensor_scale if isinstance(kind, BlockFloat) else None,
    )


def _hint(kind: Format, columns: int) -> str:
    sizes = [size for size in (16, 32, 64, 128, 256) if columns % size == 0]
    if isinstance(kind, BlockFloat) or not sizes:
        return "group=row takes rows of any length"
    return f"take groups of {', '.join(map(str, sizes))}, or group=row"
