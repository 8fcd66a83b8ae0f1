"""What an error of one expert's output costs: nats per token where gradients are known, squares where not."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from moec.calibration.sample import LayerSample
from moec.calibration.statistics import LayerStatistics
from moec.errors import UsageError
from moec.experts.layer import MoeLayer


class Distortion(Enum):
    """How errors of layers are made comparable; `auto` takes sensitivity where there are gradients, else mse."""

    AUTO = "auto"
    MSE = "mse"  # the squared error of the layer's output
    SENSITIVITY = "mse-x-sensitivity"  # times half the mean square of an element of the loss's gradient
    FISHER = "fisher"  # half the squared change of the loss that the gradient predicts, token by token

    def resolved(self, *, gradients: bool) -> Distortion:
        """What `auto` means. Raises UsageError for a measure that needs gradients where there are none."""
        if self is Distortion.AUTO:
            return Distortion.SENSITIVITY if gradients else Distortion.MSE
        if self is not Distortion.MSE and not gradients:
            raise UsageError(f"distortion={self.value} needs gradients", hint="calibrate{gradients}")
        return self


@dataclass(frozen=True)
class ErrorMeasure:
    """Prices errors of one layer. Sums over rows are divided by all rows of the sample."""

    kind: Distortion
    rows: int
    factor: float
    gradient: torch.Tensor | None

    @staticmethod
    def of(kind: Distortion, layer: MoeLayer, sample: LayerSample, statistics: LayerStatistics) -> ErrorMeasure:
        """That of a layer; `kind` is resolved."""
        factor = 1.0
        if kind is Distortion.SENSITIVITY:
            energy = statistics.layer_gradient_energy
            assert energy is not None
            factor = 0.5 * energy / layer.hidden_size
        gradient = None
        if kind is Distortion.FISHER:
            assert sample.gradient is not None
            gradient, factor = sample.gradient.double(), 0.5
        return ErrorMeasure(kind, len(sample), factor, gradient)

    def price(self, rows: torch.Tensor, errors: torch.Tensor) -> float:
        """The price of errors [n, H] of the layer's output in the rows [n] of the sample."""
        errors = errors.double()
        if self.gradient is not None:
            squares = (self.gradient[rows] * errors).sum(1).square()
        else:
            squares = errors.square()
        return self.factor * float(squares.sum()) / self.rows

    def tail_prices(self, rows: torch.Tensor, hidden: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """The price [m + 1] of losing all neurons from position k on, for k = 0 .. m.

        `hidden` [n, m] are gated activations and `columns` [H, m] those of the last product, most important first.
        """
        hidden, columns = hidden.double(), columns.double()
        if self.gradient is not None:
            along = (self.gradient[rows] @ columns) * hidden
            tails = along.flip(1).cumsum(1).square().sum(0).flip(0)
        else:
            crossed = (hidden.T @ hidden) * (columns.T @ columns)
            tails = crossed.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
        return self.factor / self.rows * torch.cat([tails.clamp_min(0), torch.zeros(1, dtype=torch.float64)])
