"""A feed-forward expert as a table of neurons: what can be permuted, averaged and moved between experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from moec.experts import Activation, Dense, Expert, FeedForward, Projection


class UnmergeableExpertError(Exception):
    """An expert whose tensors cannot be averaged with others; the message is the reason."""


@dataclass(frozen=True)
class NeuronTable:
    """Row i holds all that belongs to neuron i: its rows of gate and up, biases as a last column, and its column of
    down.

    `gate` [m, H or H + 1] or None, `up` [m, H or H + 1], `down` [m, H], `output_bias` [H] or None.
    """

    activation: Activation
    gate: torch.Tensor | None
    up: torch.Tensor
    down: torch.Tensor
    output_bias: torch.Tensor | None

    @staticmethod
    def of(expert: Expert) -> NeuronTable:
        """The table of an expert with dense matrices.

        Raises:
            UnmergeableExpertError: it has none.
        """
        if not isinstance(expert, FeedForward):
            raise UnmergeableExpertError(f"it is {type(expert).__name__.lower()}, not a feed-forward expert")
        projections = [expert.up, expert.down] if expert.gate is None else [expert.gate, expert.up, expert.down]
        if not all(isinstance(projection.matrix, Dense) for projection in projections):
            raise UnmergeableExpertError("its matrices are factored")
        return NeuronTable(
            expert.activation,
            None if expert.gate is None else _with_bias(expert.gate),
            _with_bias(expert.up),
            expert.down.dense().T,
            expert.down.bias,
        )

    @property
    def width(self) -> int:
        """m."""
        return self.up.shape[0]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All parts that there are."""
        parts = [self.gate, self.up, self.down, self.output_bias]
        return [part for part in parts if part is not None]

    @property
    def is_finite(self) -> bool:
        """Whether all weights are finite numbers."""
        return all(bool(torch.isfinite(part).all()) for part in self.tensors)

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for experts that can be averaged neuron by neuron."""
        shapes = [None if part is None else tuple(part.shape) for part in (self.gate, self.up, self.output_bias)]
        return (self.activation, *shapes)

    def rows(self) -> torch.Tensor:
        """One vector for each neuron [m, F]: the inner product of two is that of gate, up and down together."""
        return torch.cat([self.up, self.down] if self.gate is None else [self.gate, self.up, self.down], dim=1)

    def take(self, neurons: torch.Tensor) -> NeuronTable:
        """The neurons `neurons` i64 [n], in that order."""
        gate = None if self.gate is None else self.gate[neurons]
        return replace(self, gate=gate, up=self.up[neurons], down=self.down[neurons])

    def expert(self) -> FeedForward:
        """The expert with these neurons."""
        inputs = self.down.shape[1]
        return FeedForward(
            self.activation,
            None if self.gate is None else _without_bias(self.gate, inputs),
            _without_bias(self.up, inputs),
            Projection(Dense(self.down.T.contiguous()), self.output_bias),
        )


def merge_tables(tables: Sequence[NeuronTable], weights: Sequence[float]) -> NeuronTable:
    """The weighted mean, neuron by neuron; weights that add up to nothing count as equal.

    Raises:
        UnmergeableExpertError: the tables differ in kind or width.
    """
    first = tables[0]
    if any(table.kind != first.kind for table in tables):
        widths = sorted({table.width for table in tables})
        differ = f"widths {', '.join(map(str, widths))}" if len(widths) > 1 else "activations or biases that differ"
        raise UnmergeableExpertError(f"a group has {differ}")
    total = sum(weights)
    shares = [weight / total for weight in weights] if total > 0 else [1 / len(tables)] * len(tables)

    def mean(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        found = [part for part in parts if part is not None]
        # a difference to the first keeps the mean of equal tensors equal to them, bit by bit
        return (
            found[0] + sum(share * (part - found[0]) for share, part in zip(shares[1:], found[1:], strict=True))
            if found
            else None
        )

    up, down = mean([table.up for table in tables]), mean([table.down for table in tables])
    assert up is not None and down is not None
    gate, bias = mean([table.gate for table in tables]), mean([table.output_bias for table in tables])
    return NeuronTable(first.activation, gate, up, down, bias)


def _with_bias(projection: Projection) -> torch.Tensor:
    matrix = projection.dense()
    return matrix if projection.bias is None else torch.cat([matrix, projection.bias[:, None]], dim=1)


def _without_bias(rows: torch.Tensor, inputs: int) -> Projection:
    matrix = rows[:, :inputs].contiguous()
    return Projection(Dense(matrix), rows[:, inputs].contiguous() if rows.shape[1] > inputs else None)
