"""Integer codes and their scales made better in turn for given inputs, from codes that are there already.

The error is tr(E H E^T) for the change E of a matrix and the second moment H of its inputs. With scales fixed, a column
of codes that is best given all others is a rounding (coordinate descent, as QuantEase, Behdin et al. 2023); with codes
fixed, the scales of a row are a least-squares problem. Neither step makes a row worse.
"""

from __future__ import annotations

import torch

from moec.dialects.quant import Integer, Span
from moec.quantization.grids import Grid
from moec.quantization.packed import groups_of

_BLOCK = 128


def descend(
    grid: Grid, codes: torch.Tensor, weight: torch.Tensor, moment: torch.Tensor, rounds: int
) -> tuple[Grid, torch.Tensor]:
    """(grid, codes) after rounds of descent, each of them over all codes and then all scales.

    `grid` has leading dimensions [R, G], `codes` u8 [N, K]; `weight` float64 [N, K] and `moment` float64 [K, K],
    positive definite. Zero points stay, and so does a scale of the whole matrix.
    """
    assert isinstance(grid.format, Integer)
    columns = weight.shape[1]
    split = columns // groups_of(grid.format, columns)
    for _ in range(rounds):
        codes = _better_codes(grid, codes, weight, moment, split)
        if grid.format.span is not Span.TENSOR:
            grid = _better_scales(grid, codes, weight, moment, split)
    return grid, codes


def _better_codes(
    grid: Grid, codes: torch.Tensor, weight: torch.Tensor, moment: torch.Tensor, split: int
) -> torch.Tensor:
    """Each column in turn at its best codes, given those of the others."""
    columns = weight.shape[1]
    # columns lie one after the other in memory
    codes = codes.T.clone()
    found = _decode(grid, codes.T, split).T.contiguous()
    slope = moment @ (found - weight.T)
    grids = [_group(grid, number) for number in range(split)]
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        changes = torch.empty(stop - start, len(weight), dtype=torch.float64)
        for column in range(start, stop):
            best = found[column] - slope[column] / moment[column, column]
            chosen, values = grids[column * split // columns].rounded(best[:, None])
            codes[column] = chosen[:, 0]
            change = changes[column - start] = values[:, 0] - found[column]
            slope[column:stop].addr_(moment[column, column:stop], change)
        # what lies behind the block is brought up to date at once
        slope[stop:].addmm_(moment[start:stop, stop:].T, changes)
    return codes.T.contiguous()


def _better_scales(grid: Grid, codes: torch.Tensor, weight: torch.Tensor, moment: torch.Tensor, split: int) -> Grid:
    """The scales of each row that are best together; those of a row stay if rounding makes the new ones worse."""
    unit = _decode(grid, codes, split, unscaled=True)
    rows, columns = weight.shape
    size = columns // split
    normal = torch.empty(rows, split, split, dtype=torch.float64)
    for group in range(split):
        part = slice(group * size, (group + 1) * size)
        crossed = (unit[:, part] @ moment[part]) * unit
        normal[:, group] = crossed.reshape(rows, split, size).sum(2)
    wanted = ((weight @ moment) * unit).reshape(rows, split, size).sum(2)
    # a group of codes that all stand for zero has no best scale, and keeps its own
    old = grid.scale.double()[..., 0]
    floor = 1e-9 * normal.diagonal(dim1=1, dim2=2).amax(1).clamp_min(torch.finfo(torch.float64).tiny)
    ridge = floor[:, None]
    normal.diagonal(dim1=1, dim2=2).add_(ridge)
    wanted += ridge * old
    new = torch.linalg.solve(normal, wanted[..., None])[..., 0]
    limits = torch.finfo(grid.scale.dtype)
    usable = (new.isfinite() & (new > limits.tiny) & (new < limits.max)).all(1, keepdim=True)
    tried = torch.where(usable, new, old).to(grid.scale.dtype)
    better = _error(tried.double(), normal, wanted) < _error(old, normal, wanted)
    return _with_scale(grid, torch.where(better[:, None], tried, grid.scale[..., 0])[..., None])


def _error(scale: torch.Tensor, normal: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """That of each row, [N], by its normal equations [N, G, G] and [N, G], but for what no scales [N, G] change."""
    return ((normal @ scale[..., None])[..., 0] * scale - 2 * wanted * scale).sum(1)


def _decode(grid: Grid, codes: torch.Tensor, split: int, *, unscaled: bool = False) -> torch.Tensor:
    """The matrix float64 [N, K] of codes; with scales of one on demand."""
    if unscaled:
        grid = _with_scale(grid, torch.ones_like(grid.scale))
    return grid.decode(codes.reshape(len(codes), split, -1)).flatten(1)


def _with_scale(grid: Grid, scale: torch.Tensor) -> Grid:
    return Grid(grid.format, grid.settings, scale, grid.zero)


def _group(grid: Grid, number: int) -> Grid:
    """The grid of one group of columns, with leading dimension [R]."""
    zero = None if grid.zero is None else grid.zero[:, number]
    return Grid(grid.format, grid.settings, grid.scale[:, number], zero)
