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
    rows, columns = weight.shape
    codes = codes.clone()
    found = _decode(grid, codes, split)
    slope = (found - weight) @ moment
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        changes = torch.zeros(rows, stop - start, dtype=torch.float64)
        for column in range(start, stop):
            own = _group(grid, column * split // columns)
            best = found[:, column] - slope[:, column] / moment[column, column]
            codes[:, column] = own.codes(best[:, None])[:, 0]
            change = own.decode(codes[:, column : column + 1])[:, 0] - found[:, column]
            changes[:, column - start] = change
            slope[:, column:stop] += change[:, None] * moment[column, column:stop]
        # what lies behind the block, and what a next round starts from, is brought up to date at once
        slope[:, stop:] += changes @ moment[start:stop, stop:]
    return codes


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
    new = torch.linalg.solve(normal, (wanted + ridge * old)[..., None])[..., 0]
    limits = torch.finfo(grid.scale.dtype)
    usable = (new.isfinite() & (new > limits.tiny) & (new < limits.max)).all(1, keepdim=True)
    tried = _with_scale(grid, torch.where(usable, new, old).to(grid.scale.dtype)[..., None])
    better = _error(tried, codes, weight, moment, split) < _error(grid, codes, weight, moment, split)
    return _with_scale(grid, torch.where(better[:, None, None], tried.scale, grid.scale))


def _error(grid: Grid, codes: torch.Tensor, weight: torch.Tensor, moment: torch.Tensor, split: int) -> torch.Tensor:
    """That of each row, [N]."""
    change = _decode(grid, codes, split) - weight
    return ((change @ moment) * change).sum(1)


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
