"""Tables that need every expert on rows that did not choose it, computed from a sample, one expert in memory."""

from __future__ import annotations

import torch

from moec.calibration.sample import LayerSample
from moec.experts.layer import MoeLayer
from moec.experts.reading import load_expert


def mean_outputs(layer: MoeLayer, sample: LayerSample) -> torch.Tensor:
    """Mean output of each stored expert over all rows, routed to it or not: float64 [E, H] (HC-SMoE, 3.1)."""
    x = sample.x.float()
    means = [
        load_expert(layer, sample.weights, expert).apply(x).mean(0, dtype=torch.float64)
        for expert in range(layer.expert_count)
    ]
    return torch.stack(means)


def redirect_distortion(layer: MoeLayer, sample: LayerSample) -> torch.Tensor:
    """What it costs to let expert d answer for expert e: float64 [E, E], row e, column d.

    Sum over the rows that chose e of g^2 ||f_d(x) - f_e(x)||^2, where g is the gate of e. The diagonal is 0; an expert
    that no row chose costs nothing to replace.
    """
    count = layer.expert_count
    x = sample.x.float()
    chosen = [sample.chosen(layer, expert) for expert in range(count)]
    own = [load_expert(layer, sample.weights, expert).apply(x[chosen[expert][0]]) for expert in range(count)]
    result = torch.zeros(count, count, dtype=torch.float64)
    for other in range(count):
        outputs = load_expert(layer, sample.weights, other).apply(x)
        for expert, (rows, gates) in enumerate(chosen):
            if expert != other and len(rows):
                squares = (outputs[rows] - own[expert]).double().square().sum(1)
                result[expert, other] = (gates.square() * squares).sum()
    return result
