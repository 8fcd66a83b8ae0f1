"""What an error of one expert's output costs: nats per token where gradients are known, squares where not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import torch

from moec.calibration.sample import LayerSample
from moec.calibration.statistics import LayerStatistics
from moec.errors import UsageError
from moec.experts.layer import MoeLayer


class Distortion(Enum):
    """How errors of layers are made comparable; `auto` takes curvature where there are gradients, else mse."""

    AUTO = "auto"
    MSE = "mse"  # the squared error of the layer's output
    SENSITIVITY = "mse-x-sensitivity"  # times half the mean square of an element of the loss's gradient
    CURVATURE = "curvature"  # half the error in the norm of the gradient's second moment on the expert's tokens
    FISHER = "fisher"  # half the squared change of the loss that the gradient predicts, token by token

    def resolved(self, *, gradients: bool) -> Distortion:
        """What `auto` means. Raises UsageError for a measure that needs gradients where there are none."""
        if self is Distortion.AUTO:
            return Distortion.CURVATURE if gradients else Distortion.MSE
        if self is not Distortion.MSE and not gradients:
            raise UsageError(f"distortion={self.value} needs gradients", hint="calibrate{gradients}")
        return self


@dataclass(frozen=True)
class ErrorMeasure:
    """Prices errors of one layer. Sums over rows are divided by all rows of the sample.

    `root` [H, H], where there is one, is multiplied to errors from the right before they are squared. `everywhere`
    [H, H] is the second moment of the gradients of all rows.
    """

    kind: Distortion
    rows: int
    factor: float
    gradient: torch.Tensor | None
    root: torch.Tensor | None = None
    everywhere: torch.Tensor | None = None

    @staticmethod
    def of(kind: Distortion, layer: MoeLayer, sample: LayerSample, statistics: LayerStatistics) -> ErrorMeasure:
        """That of a layer; `kind` is resolved."""
        factor = 1.0
        if kind is Distortion.SENSITIVITY:
            energy = statistics.layer_gradient_energy
            assert energy is not None
            factor = 0.5 * energy / layer.hidden_size
        gradient = everywhere = None
        if kind in (Distortion.FISHER, Distortion.CURVATURE):
            assert sample.gradient is not None
            gradient, factor = sample.gradient.double(), 0.5
            everywhere = gradient.T @ gradient / len(sample)
        return ErrorMeasure(kind, len(sample), factor, gradient, everywhere=everywhere)

    def of_expert(self, rows: torch.Tensor) -> ErrorMeasure:
        """That of an expert which the rows [n] chose.

        With few rows the second moment of its gradients is drawn to that of all rows, which counts as H rows.
        """
        if self.kind is not Distortion.CURVATURE:
            return self
        assert self.gradient is not None and self.everywhere is not None
        own = self.gradient[rows]
        size = own.shape[1]
        values, vectors = torch.linalg.eigh((own.T @ own + size * self.everywhere) / (len(rows) + size))
        return replace(self, root=vectors * values.clamp_min(0).sqrt())

    def scaled_columns(self, columns: torch.Tensor) -> torch.Tensor:
        """Columns [H, m] of a last product as errors in them count."""
        return columns.double() if self.root is None else self.root.T @ columns.double()

    def as_norm(self, rows: torch.Tensor) -> ErrorMeasure:
        """One that is a norm of outputs, for the rows [n] of an expert: `fisher`, which is not, becomes `curvature`."""
        return replace(self, kind=Distortion.CURVATURE).of_expert(rows) if self.kind is Distortion.FISHER else self

    def output_weights(self, size: int) -> torch.Tensor:
        """How much the square of an error counts in each of `size` outputs alone, where this is a norm; float64."""
        return torch.ones(size, dtype=torch.float64) if self.root is None else self.root.square().sum(1)

    def of_energy(self, energy: float) -> float:
        """The price of a sum of squares of errors that are already as `scaled_columns` makes them."""
        return self.factor * energy / self.rows

    def price(self, rows: torch.Tensor, errors: torch.Tensor) -> float:
        """The price of errors [n, H] of the layer's output in the rows [n] of the sample."""
        errors = errors.double()
        if self.root is not None:
            squares = (errors @ self.root).square()
        elif self.gradient is not None:
            squares = (self.gradient[rows] * errors).sum(1).square()
        else:
            squares = errors.square()
        return self.factor * float(squares.sum()) / self.rows

    def tail_prices(self, rows: torch.Tensor, hidden: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """The price [m + 1] of losing all neurons from position k on, for k = 0 .. m.

        `hidden` [n, m] are gated activations and `columns` [H, m] those of the last product, most important first.
        """
        hidden, columns = hidden.double(), self.scaled_columns(columns)
        if self.gradient is not None and self.root is None:
            along = (self.gradient[rows] @ columns) * hidden
            tails = along.flip(1).cumsum(1).square().sum(0).flip(0)
        else:
            crossed = (hidden.T @ hidden) * (columns.T @ columns)
            tails = crossed.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
        return self.factor / self.rows * torch.cat([tails.clamp_min(0), torch.zeros(1, dtype=torch.float64)])
