"""Router weights in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch

from moec.errors import UsageError
from moec.experts import Dense, FeedForward, Projection

_CHUNK_ROWS = 2048


class FitTarget(Enum):
    """What the least-squares map of a row is to come near to."""

    CONTRIBUTION = "contribution"  # what each expert gives
    SHARE = "share"  # the same as a share of what all give, so that no row counts more than others
    RANK = "rank"  # the number of experts that give less


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


def fit_target(kind: FitTarget, importance: torch.Tensor) -> torch.Tensor:
    """The target for what experts give to rows, float64 [n, E]; of equal ones the lower expert ranks higher."""
    match kind:
        case FitTarget.CONTRIBUTION:
            return importance
        case FitTarget.SHARE:
            return importance / importance.sum(1, keepdim=True).clamp(min=1e-300)
        case FitTarget.RANK:
            order = torch.sort(importance, dim=1, descending=True, stable=True).indices
            places = torch.arange(importance.shape[1] - 1, -1, -1, dtype=torch.float64)
            return torch.zeros_like(importance, dtype=torch.float64).scatter_(1, order, places.expand(order.shape))


def least_squares(
    rows: torch.Tensor, target: torch.Tensor, ridge: float, *, bias: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [E, H] and bias [E], float64, of the linear map of `rows` [n, H] nearest to `target` [n, E].

    min ||X W^T + b - Y||^2 + ridge tr(X^T X) / H ||W||^2; the bias is not damped, and zero where there is to be none.
    """
    x, y = rows.double(), target.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    if not bias:
        mean_x, mean_y = torch.zeros_like(mean_x), torch.zeros_like(mean_y)
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


def group_rows(outputs: int, shards: int, width: int, deviation: float, generator: torch.Generator) -> torch.Tensor:
    """Weight [R, H] in which `shards` outputs in a row have equal rows, those of different groups distinct ones.

    The `shards` outputs together are one copy of a feed-forward block, so a token takes all or none of them.
    """
    rows = torch.randn(outputs // shards, width, generator=generator) * deviation
    if len(torch.unique(rows, dim=0)) < len(rows):
        raise UsageError("groups of the router would tie", hint="choose another seed or a larger deviation")
    return rows.repeat_interleave(shards, dim=0)


def domain_rows(
    rows: torch.Tensor, tokens: torch.Tensor, sequence: torch.Tensor, domain: torch.Tensor, ridge: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weight [E, H], projection P [H, D], embeddings [E, D]) with weight = embeddings P^T, float64.

    `rows` [n, H] are what the router reads, `tokens` [n, D] the token embeddings of the same n tokens, `sequence` and
    `domain` [n] say where they are from. The embedding of a domain is the mean of its tokens, that of all domains
    subtracted; P is the least-squares map from the mean embedding of a sequence to the mean row of it. A new domain
    needs no new P.
    """
    x, e = rows.double(), tokens.double()
    texts = int(sequence.max()) + 1
    counts = torch.bincount(sequence, minlength=texts).double().clamp(min=1)[:, None]
    mean_x = torch.zeros(texts, x.shape[1], dtype=torch.float64).index_add_(0, sequence, x) / counts
    mean_e = torch.zeros(texts, e.shape[1], dtype=torch.float64).index_add_(0, sequence, e) / counts
    present = torch.bincount(sequence, minlength=texts) > 0
    projection, _ = least_squares(mean_e[present], mean_x[present], ridge)
    domains = int(domain.max()) + 1
    members = torch.nn.functional.one_hot(domain, domains).double()
    embeddings = (members.T @ e) / members.sum(0).clamp(min=1)[:, None]
    embeddings = embeddings - embeddings.mean(0)
    return embeddings @ projection.T, projection, embeddings


def token_table(
    ids: torch.Tensor, target: torch.Tensor, embedding: torch.Tensor, prior: float, ridge: float
) -> torch.Tensor:
    """Logits [V, E] of every token of a vocabulary, float64: the mean `target` [n, E] of the rows that are it.

    Tokens that are seen rarely or never get what a least-squares map of the token embeddings [V, D] says, which counts
    as `prior` rows.
    """
    vocabulary, (_, experts) = len(embedding), target.shape
    y = target.double()
    weight, bias = least_squares(embedding[ids], y, ridge)
    fitted = embedding.double() @ weight.T + bias
    total = torch.zeros(vocabulary, experts, dtype=torch.float64).index_add_(0, ids, y)
    counts = torch.bincount(ids, minlength=vocabulary).double()[:, None]
    return (total + prior * fitted) / (counts + prior)


def medoids(markers: torch.Tensor, sizes: Sequence[int]) -> list[int]:
    """For each group of `sizes` neurons in a row the one whose marker is nearest to the group's mean, by angle.

    `markers` bool [n, sum of sizes]: whether a neuron is among the most active ones of a row. By distance, as CMoE
    has it, the nearest one is that which is active least, since most markers are zero. Ties go to the lower neuron.
    """
    found, start = [], 0
    for size in sizes:
        own = markers[:, start : start + size].double()
        similarity = own.T @ own.mean(1) / own.sum(0).clamp(min=1).sqrt()
        found.append(int(similarity.argmax()))
        start += size
    return found


def joined(experts: Sequence[FeedForward]) -> FeedForward:
    """One block with the neurons of all experts, in order, without biases of the output."""

    def rows(parts: Sequence[Projection]) -> Projection:
        biases = [part.bias for part in parts if part.bias is not None]
        return Projection(Dense(torch.cat([part.dense() for part in parts])), torch.cat(biases) if biases else None)

    gates = [expert.gate for expert in experts if expert.gate is not None]
    down = torch.cat([expert.down.dense() for expert in experts], dim=1)
    up = rows([expert.up for expert in experts])
    return FeedForward(experts[0].activation, rows(gates) if gates else None, up, Projection(Dense(down), None))
