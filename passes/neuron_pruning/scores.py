"""How much a neuron of an expert matters, by the criteria of published systems.

Neuron i of an expert is row i of gate and up and column i of down, D_i. φ_i is its activation, g the gate of the token
and ∇ the derivative of the loss by the layer's output; sums are over the tokens that chose the expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING

import torch

from moec.calibration.sample import LayerSample
from moec.calibration.statistics import LayerStatistics
from moec.errors import UsageError
from moec.experts import FeedForward, MoeLayer, Projection

if TYPE_CHECKING:
    from moec.calibration.calibration import Calibration

_CHUNK_ROWS = 2048


class Criterion(Enum):
    """What neurons are ranked by.

    `camera`: |D_i|² ((1 - α) Σ(g φ_i)² + α max (g φ_i)²), CAMERA (AAAI 2026). `energy-x-sensitivity`: camera times the
    layer's mean |∇|². `heapr`: mean φ_i² times mean (g ∇·D_i)², HEAPr (ICLR 2026); `heapr-sum`: that times the tokens.
    `fisher`: Σ (g ∇·D_i φ_i)². `taylor`: |Σ g ∇·D_i φ_i|, as in SlimMoE (arXiv 2506.18349). `magnitude`: the squares of
    the neuron's weights.
    """

    CAMERA = "camera"
    ENERGY_X_SENSITIVITY = "energy-x-sensitivity"
    HEAPR = "heapr"
    HEAPR_SUM = "heapr-sum"
    FISHER = "fisher"
    TAYLOR = "taylor"
    MAGNITUDE = "magnitude"
    RANDOM = "random"

    @property
    def is_measured(self) -> bool:
        """Whether it needs a calibration."""
        return self not in (Criterion.MAGNITUDE, Criterion.RANDOM)

    @property
    def reads_sums(self) -> bool:
        """Whether the calibration's sums over all tokens are enough, without its sample."""
        return self in (Criterion.CAMERA, Criterion.ENERGY_X_SENSITIVITY)


class NeuronScorer:
    """Scores of neurons, one expert after another; what it knows of a layer is kept until it is asked for the next."""

    def __init__(
        self, criterion: Criterion, calibration: Calibration | None = None, *, alpha: float = 0.0, seed: int = 0
    ) -> None:
        """`alpha` is that of `camera`, `seed` that of `random`; only the other criteria read `calibration`."""
        self.criterion = criterion
        self._calibration = calibration
        self._alpha = alpha
        self._generator = torch.Generator().manual_seed(seed)
        self._layer: MoeLayer | None = None
        self._statistics: LayerStatistics | None = None
        self._sample: LayerSample | None = None

    def scores(self, layer: MoeLayer, number: int, expert: FeedForward) -> torch.Tensor:
        """The score [m] of each neuron of the stored expert `number`, float64.

        Raises UsageError where the calibration lacks gradients that the criterion needs.
        """
        match self.criterion:
            case Criterion.RANDOM:
                return torch.rand(expert.width, dtype=torch.float64, generator=self._generator)
            case Criterion.MAGNITUDE:
                return magnitude(expert)
            case Criterion.CAMERA:
                return energy(self._sums(layer), number, expert, self._alpha)
            case Criterion.ENERGY_X_SENSITIVITY:
                sums = self._sums(layer)
                if sums.layer_gradient_energy is None:
                    raise self._without_gradients(layer)
                return sums.layer_gradient_energy * energy(sums, number, expert, 0.0)
            case _:
                sample = self._rows(layer)
                if sample.gradient is None:
                    raise self._without_gradients(layer)
                return gradient_scores(sample, *sample.chosen(layer, number), expert, self.criterion)

    def scores_beside(self, layer: MoeLayer, block: FeedForward) -> torch.Tensor:
        """As `scores`, of a block beside the experts of a layer that every token runs with gate 1.

        Sums are those over the calibration's sample, scaled to all tokens where those of experts are over all.
        """
        if self.criterion is Criterion.RANDOM or self.criterion is Criterion.MAGNITUDE:
            return self.scores(layer, -1, block)
        sample = self._rows(layer)
        if self.criterion.reads_sums:
            sums = self._sums(layer)
            squares, largest = torch.zeros(2, block.width, dtype=torch.float64).unbind()
            for start in range(0, len(sample), _CHUNK_ROWS):
                phi = block.hidden_activations(sample.x[start : start + _CHUNK_ROWS].float()).double()
                squares += phi.square().sum(0)
                largest = torch.maximum(largest, phi.abs().amax(0))
            squares *= sums.tokens / max(len(sample), 1)
            if self.criterion is Criterion.CAMERA:
                return column_energy(block.down) * ((1 - self._alpha) * squares + self._alpha * largest.square())
            if sums.layer_gradient_energy is None:
                raise self._without_gradients(layer)
            return sums.layer_gradient_energy * column_energy(block.down) * squares
        if sample.gradient is None:
            raise self._without_gradients(layer)
        gates = torch.ones(len(sample), dtype=torch.float64)
        return gradient_scores(sample, torch.arange(len(sample)), gates, block, self.criterion)

    def tokens(self, layer: MoeLayer, number: int) -> int | None:
        """How many calibration tokens chose a stored expert; None for a criterion that is not measured."""
        if not self.criterion.is_measured:
            return None
        if self.criterion.reads_sums:
            return int(self._sums(layer).count[number])
        return len(self._rows(layer).chosen(layer, number)[0])

    def _sums(self, layer: MoeLayer) -> LayerStatistics:
        self._move_to(layer)
        if self._statistics is None:
            assert self._calibration is not None
            self._statistics = self._calibration.statistics(layer)
        return self._statistics

    def _rows(self, layer: MoeLayer) -> LayerSample:
        self._move_to(layer)
        if self._sample is None:
            assert self._calibration is not None
            self._sample = self._calibration.sample(layer)
        return self._sample

    def _move_to(self, layer: MoeLayer) -> None:
        if self._layer is not layer:
            self._layer, self._statistics, self._sample = layer, None, None

    def _without_gradients(self, layer: MoeLayer) -> UsageError:
        return UsageError(
            f"the criterion {self.criterion.value} needs gradients, but the calibration has none",
            where=layer.name,
            hint="calibrate with gradients: calibrate{gradients}",
        )


def energy(statistics: LayerStatistics, number: int, expert: FeedForward, alpha: float) -> torch.Tensor:
    """`camera` scores [m] of the stored expert `number`, float64."""
    squares = (1 - alpha) * statistics.neuron_gated_square[number]
    return column_energy(expert.down) * (squares + alpha * statistics.neuron_gated_max[number].square())


def magnitude(expert: FeedForward) -> torch.Tensor:
    """`magnitude` scores [m], float64."""
    rows = [expert.up] if expert.gate is None else [expert.gate, expert.up]
    return column_energy(expert.down) + sum(item.dense().double().square().sum(1) for item in rows)


def column_energy(projection: Projection) -> torch.Tensor:
    """|D_i|² of each column [m], float64."""
    return projection.dense().double().square().sum(0)


def gradient_scores(
    sample: LayerSample, rows: torch.Tensor, gates: torch.Tensor, expert: FeedForward, criterion: Criterion
) -> torch.Tensor:
    """`heapr`, `heapr-sum`, `fisher` or `taylor` scores [m] of an expert, float64; 0 without tokens.

    `rows` int64 [n] of the sample chose it with `gates` float64 [n].
    """
    activation, slope, product, signed = torch.zeros(4, expert.width, dtype=torch.float64).unbind()
    tokens = 0
    for phi, towards in _neuron_gradients(sample, rows, gates, expert):
        tokens += len(phi)
        activation += phi.square().sum(0)
        slope += towards.square().sum(0)
        product += (phi * towards).square().sum(0)
        signed += (phi * towards).sum(0)
    count = max(tokens, 1)
    match criterion:
        case Criterion.HEAPR:
            return activation / count * (slope / count)
        case Criterion.HEAPR_SUM:
            return activation * slope / count
        case Criterion.FISHER:
            return product
        case _:
            return signed.abs()


def _neuron_gradients(
    sample: LayerSample, rows: torch.Tensor, gates: torch.Tensor, expert: FeedForward
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(φ, g ∇·D) [n, m] in float64, in parts."""
    assert sample.gradient is not None
    down = expert.down.dense().double()
    for start in range(0, len(rows), _CHUNK_ROWS):
        part, gate = rows[start : start + _CHUNK_ROWS], gates[start : start + _CHUNK_ROWS]
        phi = expert.hidden_activations(sample.x[part].float()).double()
        yield phi, (sample.gradient[part].double() * gate[:, None]) @ down
