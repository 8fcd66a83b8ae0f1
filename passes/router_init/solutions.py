"""Router weights in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moec.experts import FeedForward

_CHUNK_ROWS = 2048


def expert_importance(experts: Sequence[FeedForward], rows: torch.Tensor) -> torch.Tensor:
    """What each expert gives to each row: sum over its neurons of |phi| ||D_i||, float64 [n, E] for rows [n, H].

    It bounds the norm of the expert's output, and is what the ideal router of a factorised block ranks by.
    """
    columns = []
    for expert in experts:
        norms = expert.down.dense().norm(dim=0)
        parts = [
            (expert.hidden_activations(part).abs() @ norms).double() for part in torch.split(rows.float(), _CHUNK_ROWS)
        ]
        columns.append(torch.cat(parts))
    return torch.stack(columns, dim=1)


def least_squares(rows: torch.Tensor, target: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [E, H] and bias [E], float64, of the linear map of `rows` [n, H] nearest to `target` [n, E].

    min ||X W^T + b - Y||^2 + ridge tr(X^T X) / H ||W||^2; the bias is not damped.
    """
    x, y = rows.double(), target.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    gram = x.T @ x
    damping = ridge * float(gram.diagonal().mean())
    weight = torch.linalg.solve(gram + damping * torch.eye(len(gram), dtype=torch.float64), x.T @ y).T
    return weight, mean_y - weight @ mean_x


def weight_centroids(experts: Sequence[FeedForward]) -> torch.Tensor:
    """The mean direction of each expert's gate rows (up rows where it has no gate), float64 [E, H] (MoEfication)."""
    centroids = []
    for expert in experts:
        rows = (expert.up if expert.gate is None else expert.gate).dense().double()
        centroids.append(torch.nn.functional.normalize(rows, dim=1).mean(0))
    return torch.stack(centroids)


def row_centroids(rows: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [E, H] and bias [E]: a row goes to the nearest centroid, where centroid e is the mean of `rows` [n, H]
    weighted by how much more than the others e gives them.

    The nearest centroid c is that of the largest x c - ||c||^2 / 2, so the bias is exact (LLaMA-MoE v2 lacks it).
    """
    share = importance / importance.sum(1, keepdim=True).clamp(min=1e-300)
    weights = (share - share.mean(0)).clamp(min=0)
    centroids = weights.T @ rows.double() / weights.sum(0).clamp(min=1e-300)[:, None]
    return centroids, -0.5 * centroids.square().sum(1)
