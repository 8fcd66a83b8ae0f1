"""Second moments of one expert over the rows of a sample that chose it, in float64."""

from __future__ import annotations

import torch

from moec.calibration.sample import LayerSample
from moec.errors import UsageError
from moec.experts.expert import FeedForward
from moec.experts.layer import MoeLayer
from moec.experts.reading import load_expert


def input_second_moment(layer: MoeLayer, sample: LayerSample, expert: int, gated: bool = True) -> torch.Tensor:
    """Sum of x x^T [H, H] over the rows that chose the stored expert, each weighted with its squared gate if `gated`.

    Zero for an expert that no row chose.
    """
    rows, gates = sample.chosen(layer, expert)
    return _moment(sample.x[rows], gates, gated)


def hidden_second_moment(layer: MoeLayer, sample: LayerSample, expert: int, gated: bool = True) -> torch.Tensor:
    """Sum of phi phi^T [m, m], phi the expert's hidden activations; weights as in `input_second_moment`."""
    rows, gates = sample.chosen(layer, expert)
    return _moment(_feed_forward(layer, sample, expert).hidden_activations(sample.x[rows].float()), gates, gated)


def neuron_gradient_square(layer: MoeLayer, sample: LayerSample, expert: int) -> torch.Tensor:
    """For each neuron [m] the sum over rows of (gradient . D_i g phi_i)^2: the empirical Fisher information of a
    factor before it (HEAPr, section 3.6; SlimMoE, 2.5).

    Raises UsageError if the sample has no gradients.
    """
    if sample.gradient is None:
        raise UsageError("this needs gradients", where=layer.name, hint="calibrate{gradients=true}")
    rows, gates = sample.chosen(layer, expert)
    found = _feed_forward(layer, sample, expert)
    hidden = found.hidden_activations(sample.x[rows].float()).double() * gates[:, None]
    along = sample.gradient[rows].double() @ found.down.dense().double()
    return (along * hidden).square().sum(0)


def _feed_forward(layer: MoeLayer, sample: LayerSample, expert: int) -> FeedForward:
    found = load_expert(layer, sample.weights, expert)
    if not isinstance(found, FeedForward):
        raise UsageError(f"the expert {expert} has no hidden activations", where=layer.name)
    return found


def _moment(vectors: torch.Tensor, gates: torch.Tensor, gated: bool) -> torch.Tensor:
    weighted = vectors.double() * gates[:, None] if gated else vectors.double()
    return weighted.T @ weighted
