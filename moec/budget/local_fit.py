"""Least squares of one expert alone: what its last product could undo of its errors, as `refit-down` later does."""

from __future__ import annotations

import torch

from moec.experts import FeedForward
from moec.passes.merging.layer_fit import fitted_features, with_change


def fitted_change(features: torch.Tensor, errors: torch.Tensor, gates: torch.Tensor, ridge: float) -> torch.Tensor:
    """The change [u, H] of a last product that reads `features` [n, u] which undoes most of `errors` [n, H], float64.

    Squares count times those of `gates` [n]; `ridge` > 0 is the weight of the squared change.
    """
    weighted = features.double() * gates.double()[:, None]
    gram = weighted.T @ weighted
    gram.diagonal().add_(ridge)
    moments = weighted.T @ (errors.double() * gates.double()[:, None])
    return -torch.cholesky_solve(moments, torch.linalg.cholesky(gram))


def left_by_fit(features: torch.Tensor, errors: torch.Tensor, gates: torch.Tensor, ridge: float) -> torch.Tensor:
    """Errors [n, H] as they are after `fitted_change`, float64."""
    return errors.double() + features.double() @ fitted_change(features, errors, gates, ridge)


def refitted(
    expert: FeedForward, inputs: torch.Tensor, wanted: torch.Tensor, gates: torch.Tensor, ridge: float
) -> FeedForward:
    """The expert with its last product fitted to outputs `wanted` [n, H] on `inputs` [n, H], if it can be."""
    hidden = expert.hidden_activations(inputs)
    features = fitted_features(expert, hidden)
    if features is None:
        return expert
    return with_change(expert, fitted_change(features, expert.down.apply(hidden) - wanted, gates, ridge))
