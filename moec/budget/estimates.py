"""What codes would cost an expert, by second moments alone: none are made by GPTQ, and no outputs are computed.

GPTQ's error of a row is a sum over columns of their own rounding errors, each weighted by what later columns cannot
make up for. Rounding errors of gate and up act like noise on hidden activations, of each neuron by itself, and a refit
of the last matrix behind them is least squares with that noise. What descent takes back is a constant here, so that
estimates are right up to a factor, which is much the same for all codes of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moec.budget.coding import Coder
from moec.budget.measure import ErrorMeasure
from moec.calibration.sample import spread_rows
from moec.experts import Dense, FeedForward, Matrix
from moec.passes.factoring.sides import Side, dense_matrix, sides_of, with_matrices
from moec.quantization.grids import fit_grid
from moec.quantization.packed import groups_of
from moec.quantization.packing import split_last
from moec.quantization.rounding import round_matrix
from moec.quantization.second_order import column_errors

_ROWS = 512
"""So many rows tell how far rounding the first matrices moves hidden activations."""
_LEFT = 0.4
"""What descent, which works on all codes and scales at once, leaves of an error; seen on trained models."""


@dataclass(frozen=True)
class CodeEstimate:
    """A price: `sure` for the neurons that go, and `codes` for what rounding adds."""

    sure: float
    codes: float


@dataclass(frozen=True)
class CodedExpert:
    """The expert that `coder` would make codes of. It reads `rows` [n, H] with `gates` float64 [n].

    `measure` is that of the expert, as a norm of outputs.
    """

    expert: FeedForward
    rows: torch.Tensor
    gates: torch.Tensor
    measure: ErrorMeasure
    coder: Coder

    def estimates(
        self, kept: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]]
    ) -> list[dict[tuple[int, int], CodeEstimate]]:
        """For each set of neurons int64 [k] of `kept`, and `pairs` of bits, those of gate and up and those of down.

        Of two sets one holds the other. O(m^3 + H m^2) for each number of bits, and each set, of m neurons; float64.
        """
        refit = self.coder.rounding.options.refit
        hidden = self.expert.hidden_activations(self.rows).double() * self.gates[:, None]
        columns = self.measure.scaled_columns(self.expert.down.dense())
        moments = _Moments.of(hidden, columns, self.coder.rounding.options.damping)
        gain = self._gain()
        noises = {bits: gain * self._noise(bits) for bits in sorted({first for first, _ in pairs})}
        lost = moments.lost_to_noise(noises, kept) if refit else moments.moved(noises, kept)
        found = []
        for position, neurons in enumerate(kept):
            taken = moments.taken_over(neurons) if refit else None
            rounded = self._rounded(self._left(neurons, taken), moments.gram[neurons][:, neurons], pairs)
            sure = self.measure.of_energy(moments.without(neurons, taken))
            prices = {}
            for first, last in pairs:
                codes = _LEFT * self.measure.of_energy(lost[first][position] + rounded[last])
                prices[first, last] = CodeEstimate(sure, codes)
            found.append(prices)
        return found

    def _noise(self, bits: int) -> torch.Tensor:
        """Squares [m] that nearest codes of gate and up add to gated hidden activations, summed over all rows."""
        some = spread_rows(len(self.rows), _ROWS)
        matrices: dict[Side, Matrix] = {}
        for side in sides_of(self.expert):
            if side is not Side.DOWN:
                weight = dense_matrix(self.expert, side)
                target = self.coder.rounding.options.target(bits, weight.shape[1])
                where = f"{self.coder.where}, {side.value}"
                matrices[side] = Dense(round_matrix(target, weight, where).dense(weight.dtype))
        rows = self.rows[some]
        moved = with_matrices(self.expert, matrices).hidden_activations(rows) - self.expert.hidden_activations(rows)
        return (moved.double() * self.gates[some, None]).square().sum(0) * (len(self.rows) / max(len(some), 1))

    def _gain(self) -> float:
        """What GPTQ leaves of the error of nearest codes where columns make up for each other."""
        options, moment = self.coder.rounding.options, self.coder.rounding.inputs.moment
        total = float(moment.diagonal().sum())
        target = options.target(1, len(moment))
        return float(column_errors(target, moment, options.damping).sum()) / total if total else 1.0

    def _left(self, neurons: torch.Tensor, taken: torch.Tensor | None) -> torch.Tensor:
        """The last matrix [H, k], which has taken over what it can of the neurons that go."""
        columns = self.expert.down.dense().double()
        return columns[:, neurons] + (0.0 if taken is None else columns[:, _others(columns, neurons)] @ taken.T)

    def _rounded(self, last: torch.Tensor, gram: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> dict[int, float]:
        """The squared error of the last matrix in codes of each number of bits: spread evenly within a step."""
        options, columns = self.coder.rounding.options, last.shape[1]
        importance = self.measure.output_weights(len(last))
        errors = column_errors(options.target(1, columns), gram, options.damping)
        found = {}
        for bits in sorted({bits for _, bits in pairs}):
            target = options.target(bits, columns)
            group = groups_of(target.format, columns)
            step = fit_grid(target.format, split_last(last, group), target.settings).scale[..., 0].double()
            found[bits] = float((importance @ step.square()) @ errors.reshape(-1, group).sum(1)) / 12
        return found


@dataclass(frozen=True)
class _Moments:
    """`gram` [m, m] of gated hidden activations, and `columns` [H, m] of the last matrix, as errors in them count.

    `ridge` is the weight of the change of that matrix in a refit.
    """

    gram: torch.Tensor
    columns: torch.Tensor
    ridge: float

    @staticmethod
    def of(hidden: torch.Tensor, columns: torch.Tensor, damping: float) -> _Moments:
        gram = hidden.T @ hidden
        return _Moments(gram, columns, damping * float(gram.diagonal().mean()) or 1.0)

    def taken_over(self, neurons: torch.Tensor) -> torch.Tensor:
        """What of the columns of each other neuron those that stay take over by least squares, [k, m - k]."""
        regular = self.gram[neurons][:, neurons] + self.ridge * torch.eye(len(neurons), dtype=torch.float64)
        crossed = self.gram[neurons][:, _others(self.gram, neurons)]
        return torch.cholesky_solve(crossed, _cholesky(regular))

    def without(self, neurons: torch.Tensor, taken: torch.Tensor | None) -> float:
        """The squared error where only some neurons stay, and have taken over from the others."""
        others = _others(self.gram, neurons)
        energy = self.gram[others][:, others]
        if taken is not None:
            both = taken.T @ self.gram[neurons][:, others]
            energy = energy - both - both.T + taken.T @ self.gram[neurons][:, neurons] @ taken
        gone = self.columns[:, others]
        return max(float(((gone @ energy) * gone).sum()), 0.0)

    def moved(self, noises: Mapping[int, torch.Tensor], kept: Sequence[torch.Tensor]) -> dict[int, list[float]]:
        """The squared errors of noises, squares [m], on hidden activations of each set of neurons."""
        weights = self.columns.square().sum(0)
        return {bits: [float((noise * weights)[item].sum()) for item in kept] for bits, noise in noises.items()}

    def lost_to_noise(self, noises: Mapping[int, torch.Tensor], kept: Sequence[torch.Tensor]) -> dict[int, list[float]]:
        """The same behind a refit that knows of the noise."""
        count = torch.zeros(len(self.gram), dtype=torch.int64)
        for neurons in kept:
            count[neurons] += 1
        order = torch.sort(count, descending=True, stable=True).indices
        regular = (self.gram + self.ridge * torch.eye(len(count), dtype=torch.float64))[order][:, order]
        wanted = regular @ self.columns.T[order]
        still = _explained(regular, wanted)
        found = {}
        for bits, noise in noises.items():
            lost = (still - _explained(regular + noise[order].diag(), wanted)).cumsum(0)
            found[bits] = [max(float(lost[len(neurons) - 1]), 0.0) for neurons in kept]
        return found


def _explained(regular: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How much each unknown [m] takes from the squared error, for `wanted` [m, H], if those before it are there."""
    parts: torch.Tensor = torch.linalg.solve_triangular(_cholesky(regular), wanted, upper=False)
    return parts.square().sum(1)


def _cholesky(regular: torch.Tensor) -> torch.Tensor:
    """The lower factor; of what is not finite too, which makes estimates that are not."""
    lower: torch.Tensor = torch.linalg.cholesky_ex(regular).L
    return lower


def _others(columns: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
    """The neurons that do not stay, ascending."""
    gone = torch.ones(columns.shape[1], dtype=torch.bool)
    gone[neurons] = False
    return gone.nonzero()[:, 0]
