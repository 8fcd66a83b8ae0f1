"""How much a refit may change last products, in prices after it: found on the calibration text alone."""

from __future__ import annotations

import torch

from moec.budget.elimination import eliminate
from moec.calibration.sample import LayerSample
from moec.calibration.statistics import LayerStatistics
from moec.experts import Dense, FeedForward, MoeLayer, load_expert
from moec.passes.merging.least_squares import held_out_rows

RIDGES = (1e-3, 1e-2, 1e-1)
"""Weights of the change against the error, those that `refit-down` tries; shares of the mean energy of a neuron."""

_USUAL = 1e-2
_HELD_OUT = 0.2
_LOOKED_AT = 8
"""Experts of a layer, the most chosen ones, that the ridges are compared on."""


def refit_ridge(layer: MoeLayer, sample: LayerSample, statistics: LayerStatistics) -> float:
    """The one of `RIDGES`, in the unit of sums of g^2 phi^2 over the sample, that is best on rows it has not seen.

    Half of the neurons of each expert go, by the sequences that are not held out, and those that stay are fitted; the
    ridge with the least squared error on the held-out ones is taken. Above 0 always.
    """
    squares = torch.cat(statistics.neuron_gated_square)
    energy = float(squares.mean()) / max(statistics.tokens, 1) * len(sample) if squares.numel() else 0.0
    unit = energy or 1.0
    held = held_out_rows(sample.sequence, _HELD_OUT, torch.Generator().manual_seed(0))
    errors = torch.zeros(len(RIDGES), dtype=torch.float64)
    for number in torch.sort(statistics.count, descending=True, stable=True).indices[:_LOOKED_AT].tolist():
        rows, gates = sample.chosen(layer, number)
        expert = load_expert(layer, sample.weights, number)
        if isinstance(expert, FeedForward) and isinstance(expert.down.matrix, Dense) and expert.width > 1:
            hidden = expert.hidden_activations(sample.x[rows].float()).double() * gates[:, None]
            errors += held_out_errors(hidden, expert.down.dense().double(), held[rows], unit)
    return unit * (RIDGES[int(errors.argmin())] if bool(errors.any()) else _USUAL)


def held_out_errors(hidden: torch.Tensor, columns: torch.Tensor, held: torch.Tensor, unit: float) -> torch.Tensor:
    """Squared errors [ridges] on the rows `held` (bool [n]) of gated activations [n, m] for columns [H, m].

    `unit` is the mean energy of a neuron; zeros where no rows are held out or none are left.
    """
    seen, unseen = hidden[~held], hidden[held]
    if not len(seen) or not len(unseen):
        return torch.zeros(len(RIDGES), dtype=torch.float64)
    found = []
    for ridge in RIDGES:
        # fewer rows than the whole sample has: the ridge shrinks with them
        (rest,) = eliminate(seen, columns, [hidden.shape[1] // 2], ridge * unit * len(seen) / len(hidden))
        found.append((unseen @ columns.T - unseen[:, rest.kept] @ rest.columns.T).square().sum())
    return torch.stack(found)
