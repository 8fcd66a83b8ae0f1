"""What the matrices of a layer's experts read on the calibration text: sums over the tokens that chose an expert."""

from __future__ import annotations

from enum import Enum

import torch

from moec.calibration.sample import LayerSample
from moec.calibration.second_moments import hidden_second_moment, input_second_moment
from moec.experts import FeedForward, MoeLayer


class Matrix(Enum):
    """The matrices of an expert; gate and up read the same rows."""

    GATE = "gate"
    UP = "up"
    DOWN = "down"


class LayerInputs:
    """The inputs x of the matrices of a layer's stored experts; sums are weighted by the squared gate if `gated`."""

    def __init__(self, layer: MoeLayer, sample: LayerSample, *, gated: bool) -> None:
        self._layer = layer
        self._sample = sample
        self._gated = gated

    def tokens(self, number: int) -> int:
        """How many rows of the sample chose a stored expert."""
        return len(self._sample.chosen(self._layer, number)[0])

    def square_sum(self, number: int, expert: FeedForward, matrix: Matrix) -> torch.Tensor:
        """Σ x² [in], float64."""
        rows, gates = self._sample.chosen(self._layer, number)
        x = self._sample.x[rows].float()
        if matrix is Matrix.DOWN:
            x = expert.hidden_activations(x)
        weights = gates.square() if self._gated else torch.ones_like(gates)
        return weights @ x.double().square()

    def moment(self, number: int, matrix: Matrix) -> torch.Tensor:
        """Σ x xᵀ [in, in], float64; zeros for an expert that no row chose."""
        moment = hidden_second_moment if matrix is Matrix.DOWN else input_second_moment
        return moment(self._layer, self._sample, number, self._gated)
