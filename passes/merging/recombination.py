"""Recombination: neurons of dropped experts join the most similar neurons of experts that stay.

After DERN (Dropping Experts, Recombining Neurons; arXiv 2509.10377), of which no code was seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from moec.passes.merging.neurons import NeuronTable


class ClusterStart(Enum):
    """Where the clusters of neurons begin: at the expert's own, at those of largest gate row, or at random ones."""

    OWN = "own"
    LARGEST = "largest"
    RANDOM = "random"


@dataclass(frozen=True)
class Recombined:
    """`tables` of the experts that stay, None where nothing was received; `received` i64 [dropped, staying] counts the
    neurons that each got from each dropped expert."""

    tables: tuple[NeuronTable | None, ...]
    received: torch.Tensor


def segment_directions(table: NeuronTable, use_gate: bool) -> torch.Tensor:
    """One unit vector for each neuron [m, F], in which up, down and, on request, gate weigh the same."""
    parts = [table.up, table.down]
    if use_gate and table.gate is not None:
        parts.append(table.gate)
    return torch.nn.functional.normalize(torch.cat([_unit(part.double()) for part in parts], dim=1), dim=1)


def recombine(
    staying: Sequence[NeuronTable | None],
    dropped: Sequence[NeuronTable],
    importance: Sequence[float],
    dropped_importance: Sequence[float],
    *,
    tau: float,
    use_gate: bool,
    start: ClusterStart,
    generator: torch.Generator,
) -> Recombined:
    """Assigns each neuron of `dropped` to the expert of `staying` that has the most similar one, if its cosine is above
    `tau`, and clusters what an expert has then down to its width.

    `staying` is None for experts that must not change. `importance` weighs the means, by the expert a neuron is from.
    """
    received = torch.zeros(len(dropped), len(staying), dtype=torch.int64)
    gifts: list[list[tuple[NeuronTable, float]]] = [[] for _ in staying]
    directions = [None if table is None else segment_directions(table, use_gate) for table in staying]
    for source, table in enumerate(dropped):
        best, owner = _most_similar(segment_directions(table, use_gate), table.kind, staying, directions)
        for expert in range(len(staying)):
            neurons = torch.nonzero((owner == expert) & (best > tau)).flatten()
            received[source, expert] = len(neurons)
            if len(neurons):
                gifts[expert].append((table.take(neurons), dropped_importance[source]))
    tables = tuple(
        _cluster(table, importance[expert], gifts[expert], use_gate, start, generator)
        if table is not None and gifts[expert]
        else None
        for expert, table in enumerate(staying)
    )
    return Recombined(tables, received)


def _most_similar(
    segments: torch.Tensor,
    kind: tuple[object, ...],
    staying: Sequence[NeuronTable | None],
    directions: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(largest cosine, expert that has it) of each segment; ties to the lower expert."""
    best = torch.full((len(segments),), -torch.inf, dtype=torch.float64)
    owner = torch.full((len(segments),), -1)
    for expert, (table, mine) in enumerate(zip(staying, directions, strict=True)):
        if table is None or mine is None or not compatible(table.kind, kind):
            continue
        similarity = (segments @ mine.T).amax(dim=1)
        # rounding must not decide between equal experts
        closer = similarity > best + 1e-12
        best, owner = torch.where(closer, similarity, best), torch.where(closer, expert, owner)
    return best, owner


def compatible(first: tuple[object, ...], second: tuple[object, ...]) -> bool:
    """Whether neurons of one kind fit the other, whatever the widths."""
    return len(first) == len(second) and all(
        a == b or (isinstance(a, tuple) and isinstance(b, tuple) and a[1:] == b[1:])
        for a, b in zip(first, second, strict=True)
    )


def _cluster(
    own: NeuronTable,
    importance: float,
    gifts: Sequence[tuple[NeuronTable, float]],
    use_gate: bool,
    start: ClusterStart,
    generator: torch.Generator,
) -> NeuronTable:
    tables = [own, *(table for table, _ in gifts)]
    gate = None if own.gate is None else torch.cat([table.gate for table in tables if table.gate is not None])
    union = NeuronTable(
        own.activation,
        gate,
        torch.cat([table.up for table in tables]),
        torch.cat([table.down for table in tables]),
        own.output_bias,
    )
    weights = torch.cat(
        [
            torch.full((table.width,), value, dtype=torch.float64)
            for table, value in zip(tables, [importance, *(value for _, value in gifts)], strict=True)
        ]
    )
    if float(weights.sum()) <= 0:
        weights = torch.ones_like(weights)
    labels = spherical_k_means(
        segment_directions(union, use_gate), weights, _first_centres(union, own.width, start, generator)
    )
    return _cluster_means(union, weights, labels, own.width)


def _first_centres(union: NeuronTable, width: int, start: ClusterStart, generator: torch.Generator) -> torch.Tensor:
    if start is ClusterStart.OWN:
        return torch.arange(width)
    if start is ClusterStart.RANDOM:
        return torch.randperm(union.width, generator=generator)[:width]
    rows = union.up if union.gate is None else union.gate
    order: torch.Tensor = rows.double().norm(dim=1).argsort(descending=True, stable=True)
    return order[:width]


def spherical_k_means(
    directions: torch.Tensor, weights: torch.Tensor, first: torch.Tensor, iterations: int = 50
) -> torch.Tensor:
    """Labels i64 [n] of unit vectors [n, F] with weights [n], from the centres `directions[first]`.

    A cluster that runs empty takes the vector that fits its own cluster worst, so that every label is used.
    """
    count = len(first)
    centres = directions[first]
    labels = torch.full((len(directions),), -1)
    for _ in range(iterations):
        similarity = directions @ centres.T
        found = _first_of_largest(similarity)
        fit = similarity[torch.arange(len(found)), found]
        for label in range(count):
            if not bool((found == label).any()):
                sizes = torch.bincount(found, minlength=count)
                moved = int(torch.where(sizes[found] > 1, fit, torch.inf).argmin())
                found[moved], fit[moved] = label, 1.0
        if torch.equal(found, labels):
            break
        labels = found
        sums = torch.zeros_like(centres).index_add_(0, labels, directions * weights[:, None])
        fallback = torch.zeros_like(centres).index_add_(0, labels, directions)
        centres = _unit(torch.where(sums.norm(dim=1, keepdim=True) > 0, sums, fallback))
    return labels


def _first_of_largest(similarity: torch.Tensor) -> torch.Tensor:
    """The first label whose similarity is the largest but for rounding."""
    near = similarity >= similarity.amax(dim=1, keepdim=True) - 1e-12
    return near.to(torch.int8).argmax(dim=1)


def _cluster_means(union: NeuronTable, weights: torch.Tensor, labels: torch.Tensor, count: int) -> NeuronTable:
    totals = torch.zeros(count, dtype=torch.float64).index_add_(0, labels, weights)
    sizes = torch.bincount(labels, minlength=count).double()
    shares = torch.where(totals[labels] > 0, weights / totals[labels].clamp(min=1e-300), 1.0 / sizes[labels])

    def mean(part: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(count, part.shape[1], dtype=torch.float64)
        return sums.index_add_(0, labels, part.double() * shares[:, None]).to(part.dtype)

    gate = None if union.gate is None else mean(union.gate)
    return NeuronTable(union.activation, gate, mean(union.up), mean(union.down), union.output_bias)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    norms = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1.0)
