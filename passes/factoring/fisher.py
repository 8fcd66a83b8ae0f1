"""The empirical Fisher information of an expert's weights, element by element."""

from __future__ import annotations

import torch

from moec.calibration.sample import LayerSample
from moec.errors import UsageError
from moec.experts import FeedForward, MoeLayer
from moec.passes.factoring.sides import Side


def element_importance(
    layer: MoeLayer, sample: LayerSample, number: int, expert: FeedForward, side: Side
) -> torch.Tensor:
    """Sum over rows of the squared derivative of the loss by each element of a matrix [out, in], float64.

    The derivative of one row is an outer product, so the sum is a product of squares. Zero where no row chose the
    expert. After D2-MoE (arXiv 2502.17298, section 3.1), which squares the derivative of whole batches.

    Raises:
        UsageError: the sample has no gradients.
    """
    if sample.gradient is None:
        raise UsageError(
            "a base weighted by Fisher information needs gradients",
            where=layer.name,
            hint="use calibrate{gradients=true}, or base=frequency",
        )
    rows, gates = sample.chosen(layer, number)
    x = sample.x[rows].float()
    with torch.enable_grad():
        up = expert.up.apply(x).detach().requires_grad_()
        gate = None if expert.gate is None else expert.gate.apply(x).detach().requires_grad_()
        hidden = expert.activation.compute(gate, up)
        outgoing = sample.gradient[rows].double() * gates[:, None]
        if side is Side.DOWN:
            return outgoing.square().T @ hidden.detach().double().square()
        wanted = gate if side is Side.GATE else up
        assert wanted is not None
        by_hidden = (outgoing @ expert.down.dense().double()).to(hidden.dtype)
        (derivative,) = torch.autograd.grad(hidden, wanted, by_hidden)
    return derivative.double().square().T @ x.double().square()
