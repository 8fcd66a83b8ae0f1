"""Which neurons of an expert stay when those that stay may take over what the others did (`refit-down` lets them).

Neurons go backwards, as weights do in Optimal Brain Surgeon (Hassibi and Stork, 1993): the one goes whose part the
others replace best by least squares, and their columns of the last product take it over before the next one goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

ROUNDS_PER_WIDTH = 4
"""Neurons between two widths go in so many rounds at most; those of one round are chosen as if each went alone."""


@dataclass(frozen=True)
class Remainder:
    """`kept` int64: the neurons that stay, ascending, and their fitted `columns` [H, kept], float64.

    `energy` is the squared error of the refitted product.
    """

    kept: torch.Tensor
    columns: torch.Tensor
    energy: float


def eliminate(hidden: torch.Tensor, columns: torch.Tensor, widths: Sequence[int], ridge: float) -> list[Remainder]:
    """What stays at each of `widths`, which are below m and above 0, in their order.

    `hidden` [n, m] are gated activations, `columns` [H, m] those of the last product; `ridge` > 0 is the weight of the
    squared change of columns against the squared error, as `refit-down` has one. O(m^3 + H m^2), float64.
    """
    columns = columns.double()
    gram = hidden.double().T @ hidden.double()
    size = len(gram)
    inverse = torch.linalg.inv(gram + ridge * torch.eye(size, dtype=torch.float64))
    changed = columns.clone()
    alive = torch.arange(size)
    penalized = 0.0
    found: dict[int, Remainder] = {}
    for width in sorted(set(widths), reverse=True):
        for rounds in range(ROUNDS_PER_WIDTH, 0, -1):
            count = -(-(len(alive) - width) // rounds)
            if count == 0:
                continue
            # the fit changes only columns that stay: the ridge's part for those that go is no cost
            scores = changed.square().sum(0) / inverse.diagonal() - ridge * columns[:, alive].square().sum(0)
            order = torch.sort(scores, stable=True).indices
            gone, left = torch.sort(order[:count]).values, torch.sort(order[count:]).values
            weights = torch.linalg.inv(inverse[gone][:, gone])
            penalized += float(((changed[:, gone] @ weights) * changed[:, gone]).sum())
            moved = weights @ inverse[gone][:, left]
            changed = changed[:, left] - changed[:, gone] @ moved
            inverse = inverse[left][:, left] - inverse[left][:, gone] @ moved
            alive = alive[left]
        change = float((changed - columns[:, alive]).square().sum())
        removed = float(columns.square().sum() - columns[:, alive].square().sum())
        found[width] = Remainder(alive, changed, max(penalized - ridge * (change + removed), 0.0))
    return [found[width] for width in widths]
