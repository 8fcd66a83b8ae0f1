"""Codes that make up for each other's errors on given inputs: GPTQ (Frantar et al., 2023).

Columns are rounded one after the other; what a column loses is taken from those that are still to come, in the
proportion that changes W x the least, x with the second moment H. Scales are fitted to the matrix as it is when their
first column is due, all updates included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum

import torch

from moec.dialects.quant import Codebook, Integer, Span
from moec.errors import UsageError
from moec.quantization.descent import descend
from moec.quantization.grids import Grid, fit_grid
from moec.quantization.packed import Packed, groups_of
from moec.quantization.rounding import Target, pack, round_groups

_BLOCK = 128
_MORE_DAMPING = (1.0, 10.0, 100.0)
_FLOOR = 1e-6


class Fallback(Enum):
    """What a matrix needed besides the damping that was asked for."""

    NONE = "none"
    MORE_DAMPING = "more damping"
    NEAREST = "nearest codes"


@dataclass(frozen=True)
class SecondOrderResult:
    """A packed matrix, and what was needed to get it."""

    packed: Packed
    fallback: Fallback


@dataclass
class Damped:
    """A second moment [K, K], float64, and what is added to its diagonal, as a share of the mean of that.

    Factors are kept for the order that was asked for last: all matrices that read the same share them.
    """

    moment: torch.Tensor
    damping: float
    _order: torch.Tensor | None = field(default=None, repr=False)
    _factors: _Factors | None = field(default=None, repr=False)

    def factors(self, order: torch.Tensor) -> _Factors | None:
        """For columns in an order, int64 [K]; None where no damping helps, or where there are no inputs."""
        if self._order is None or not torch.equal(self._order, order):
            self._order, self._factors = order, _factors(self.moment, self.damping, order)
        return self._factors


@dataclass(frozen=True)
class _Factors:
    """The damped moment [K, K], U of U^T U = H^-1 for its columns in an order, and what it took."""

    moment: torch.Tensor
    upper: torch.Tensor
    fallback: Fallback


def round_second_order(
    target: Target,
    weight: torch.Tensor,
    moment: torch.Tensor | Damped,
    *,
    damping: float = 0.1,
    ordered: bool = True,
    rounds: int = 0,
    where: str = "",
) -> SecondOrderResult:
    """The matrix [N, K] in a format, for inputs of second moment [K, K] (any multiple of it, symmetric).

    `damping`: what is added to the diagonal of the moment, as a share of its mean, unless that says it itself; ten and
    a hundred times as much where the moment is not positive definite, and nearest codes where that fails too, or where
    there are no inputs.
    `ordered`: columns of large inputs first; where groups share scales, whole groups move, so that no index is stored.
    `rounds`: how often codes and scales of integers are made better in turn afterwards, on the damped moment.
    Raises UsageError for a matrix that does not fit the format, UnsafeInputError for one that is not finite.
    """
    weight = weight.double()
    target = target.prepared(weight, where)
    if isinstance(target.format, Codebook) and target.format.dim > 1:
        raise UsageError("entries of several weights cannot be rounded column by column", where=where)
    damped = moment if isinstance(moment, Damped) else Damped(moment.double(), damping)
    try:
        order = _order(target, damped.moment, ordered)
        factors = damped.factors(order)
        if factors is None:
            return SecondOrderResult(pack(target, weight.shape[1], *round_groups(target, weight)), Fallback.NEAREST)
        grid, codes = _round_columns(target, weight, factors.upper, order)
        if rounds and isinstance(target.format, Integer):
            grid, codes = descend(grid, codes, weight, factors.moment, rounds)
    except UsageError as error:
        raise UsageError(error.message, where=where, hint=error.hint) from error
    return SecondOrderResult(pack(target, weight.shape[1], grid, codes), factors.fallback)


def column_errors(target: Target, moment: torch.Tensor, damping: float) -> torch.Tensor:
    """What columns add to GPTQ's error, d float64 [K]: a row errs by sum d_j r_j^2, r_j the error of rounding column j.

    r_j is that of the column when its turn comes. d_j is what of column j the later ones cannot make up for: the
    inverse square of U_jj, and the square of the Cholesky factor's diagonal in the reverse order.
    """
    moment = moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    order = _order(target, moment, True).flip(0)
    factor, problem = torch.linalg.cholesky_ex(moment[order][:, order])
    if int(problem):
        return moment.diagonal()
    return torch.empty_like(moment[0]).index_copy_(0, order, factor.diagonal().square())


def _factors(moment: torch.Tensor, damping: float, order: torch.Tensor) -> _Factors | None:
    mean = float(moment.diagonal().mean())
    if not bool(torch.isfinite(moment).all()) or mean <= 0:
        return None
    # inputs may be of any size
    moment = moment / mean
    for number, factor in enumerate(_MORE_DAMPING):
        damped = moment + max(damping * factor, _FLOOR) * torch.eye(len(moment), dtype=torch.float64)
        lower, problem = torch.linalg.cholesky_ex(damped[order][:, order])
        if int(problem):
            continue
        upper, problem = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(problem):
            return _Factors(damped, upper, Fallback.MORE_DAMPING if number else Fallback.NONE)
    return None


def _order(target: Target, moment: torch.Tensor, ordered: bool) -> torch.Tensor:
    """The order of the columns, int64 [K]: groups stay together."""
    size = len(moment)
    if not ordered:
        return torch.arange(size)
    diagonal = moment.diagonal().double().reshape(-1, groups_of(target.format, size))
    within = diagonal.sort(dim=1, descending=True, stable=True).indices
    columns = torch.arange(size).reshape(diagonal.shape).gather(1, within)
    return columns[diagonal.sum(1).sort(descending=True, stable=True).indices].flatten()


def _round_columns(
    target: Target, weight: torch.Tensor, upper: torch.Tensor, order: torch.Tensor
) -> tuple[Grid, torch.Tensor]:
    """(grid with leading dimensions [R, G], codes [N, K])."""
    kind = target.format
    columns = weight.shape[1]
    group = groups_of(kind, columns)
    # columns lie one after the other in memory
    work = weight.T[order]
    codes = torch.empty(work.shape, dtype=torch.uint8)
    found: dict[int, Grid] = {}
    grid: Grid | None = None
    for start, stop in _blocks(columns, group):
        if start % group == 0:
            # the members of a group lie together, in any order
            fitted = work[start : start + group].T
            fitted = fitted.reshape(1, -1) if getattr(kind, "span", None) is Span.TENSOR else fitted
            grid = found[int(order[start]) // group] = fit_grid(kind, fitted, target.settings)
        assert grid is not None
        errors = torch.empty(stop - start, work.shape[1], dtype=torch.float64)
        for column in range(start, stop):
            chosen, values = grid.rounded(work[column, :, None])
            codes[column] = chosen[:, 0]
            error = errors[column - start] = (work[column] - values[:, 0]) / upper[column, column]
            work[column + 1 : stop].addr_(upper[column, column + 1 : stop], error, alpha=-1)
        work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    natural = torch.empty(weight.shape, dtype=torch.uint8)
    natural[:, order] = codes.T
    grids = [found[number] for number in sorted(found)]
    zeros = [item.zero for item in grids if item.zero is not None]
    scale = torch.stack([item.scale for item in grids], dim=1)
    return replace(grids[0], scale=scale, zero=torch.stack(zeros, dim=1) if zeros else None), natural


def _blocks(columns: int, group: int) -> Iterator[tuple[int, int]]:
    """Spans of at most 128 columns that do not cross the border of a group."""
    for first in range(0, columns, group):
        for start in range(first, first + group, _BLOCK):
            yield start, min(start + _BLOCK, first + group)
