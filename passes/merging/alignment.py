"""Alignment: in which order the neurons of one expert match those of another."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment

from moec.passes.merging.neurons import NeuronTable


def weight_profit(reference: NeuronTable, other: NeuronTable) -> torch.Tensor:
    """Inner products of neurons [m, m]: `G_ref G^T + U_ref U^T + D_ref^T D`, biases included.

    After M-SMoE (arXiv 2310.01334, section 3.1), with the gate that its experts lack.
    """
    return reference.rows().double() @ other.rows().double().T


def activation_profit(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Cosines [m, m] of hidden activations [n, m] on the same tokens; 0 for neurons that never act."""
    first, second = _unit_columns(reference.double()), _unit_columns(other.double())
    return first.T @ second


def align(profit: torch.Tensor) -> torch.Tensor:
    """i64 [m]: entry i is the neuron of the other expert that goes to place i, of greatest total profit.

    The identity wins where no other order is better.
    """
    order = torch.arange(profit.shape[0])
    rows, columns = linear_sum_assignment(profit.numpy(), maximize=True)
    found = torch.as_tensor(columns)
    gain = float(profit[torch.as_tensor(rows), found].sum() - profit.diagonal().sum())
    return found if gain > 1e-12 * float(profit.abs().max()) * len(order) else order


def _unit_columns(activations: torch.Tensor) -> torch.Tensor:
    norms = activations.norm(dim=0)
    return activations / torch.where(norms > 0, norms, 1.0)
