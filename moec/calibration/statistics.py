"""First-order sums of one layer over tokens, in float64: how often experts are used, and how much they give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

_PER_NEURON = ("neuron_gated_square", "neuron_square", "neuron_gated_max")
_PER_EXPERT = (
    "count", "gate_mass", "output_norm_sum", "output_square_sum", "gated_norm_sum", "gated_square_sum"
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Sums over the tokens that chose a stored expert; f is the expert's output [H], g its gate, phi what its last
    product reads [m].

    float64 on the CPU, by stored expert unless it says otherwise. `tokens` were seen in all; an expert that none of
    them chose has zeros everywhere. `layer_gradient_energy` is the mean over tokens of the squared norm of the loss's
    derivative by the layer's output, None without gradients.
    """

    tokens: int
    count: torch.Tensor
    """[E] tokens."""
    gate_mass: torch.Tensor
    """[E] sum of g."""
    coactivation: torch.Tensor
    """[E, E] tokens that chose both."""
    logit_gram: torch.Tensor
    """[R, R] sum of z z^T over all tokens, z the router's logits."""
    logit_sum: torch.Tensor
    """[R] sum of z over all tokens."""
    output_norm_sum: torch.Tensor
    """[E] sum of ||f||."""
    output_square_sum: torch.Tensor
    """[E] sum of ||f||^2."""
    gated_norm_sum: torch.Tensor
    """[E] sum of |g| ||f||."""
    gated_square_sum: torch.Tensor
    """[E] sum of g^2 ||f||^2."""
    output_max: torch.Tensor
    """[E] largest |f_i|."""
    output_sum: torch.Tensor
    """[E, H] sum of f."""
    neuron_gated_square: tuple[torch.Tensor, ...]
    """[m] for each expert: sum of g^2 phi^2."""
    neuron_square: tuple[torch.Tensor, ...]
    """[m] for each expert: sum of phi^2."""
    neuron_gated_max: tuple[torch.Tensor, ...]
    """[m] for each expert: largest |g phi|."""
    layer_gradient_energy: float | None = None

    def pack(self) -> torch.Tensor:
        """All fields in one float64 vector: for each its rank, sizes and elements."""
        pieces: list[torch.Tensor] = []
        for value in (getattr(self, field.name) for field in fields(self)):
            tensors = value if isinstance(value, tuple) else (_as_tensor(value),)
            pieces.append(torch.tensor([len(tensors)], dtype=torch.float64))
            for tensor in tensors:
                pieces += [torch.tensor([tensor.ndim, *tensor.shape], dtype=torch.float64), tensor.reshape(-1)]
        return torch.cat(pieces)

    @staticmethod
    def unpack(packed: torch.Tensor) -> LayerStatistics:
        """The reverse of `pack`."""
        position = 0

        def take(count: int) -> torch.Tensor:
            nonlocal position
            position += count
            return packed[position - count : position]

        found: dict[str, Any] = {}
        for field in fields(LayerStatistics):
            tensors = []
            for _ in range(int(take(1))):
                shape = [int(size) for size in take(int(take(1)))]
                tensors.append(take(math.prod(shape)).reshape(shape).clone())
            found[field.name] = tuple(tensors) if field.name in _PER_NEURON else tensors[0]
        energy = float(found.pop("layer_gradient_energy"))
        found["layer_gradient_energy"] = None if math.isnan(energy) else energy
        return LayerStatistics(**{**found, "tokens": int(found["tokens"])})


def _as_tensor(value: torch.Tensor | float | None) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    return torch.tensor(torch.nan if value is None else float(value), dtype=torch.float64)


class StatisticsSum:
    """Adds up `LayerStatistics`, batch by batch."""

    def __init__(self, outputs: int, hidden_size: int, widths: Sequence[int]) -> None:
        """`outputs` of the router; `widths`: m of each stored expert, 0 for one without hidden activations."""
        experts = len(widths)
        self._tokens = 0
        self._sums = torch.zeros(experts, len(_PER_EXPERT), dtype=torch.float64)
        self._coactivation = torch.zeros(experts, experts, dtype=torch.float64)
        self._logit_gram = torch.zeros(outputs, outputs, dtype=torch.float64)
        self._logit_sum = torch.zeros(outputs, dtype=torch.float64)
        self._output_max = torch.zeros(experts, dtype=torch.float64)
        self._output_sum = torch.zeros(experts, hidden_size, dtype=torch.float64)
        self._neurons = tuple(torch.zeros(3, width, dtype=torch.float64) for width in widths)

    def add_logits(self, logits: torch.Tensor) -> None:
        """Router logits [n, R] of n tokens."""
        z = logits.double()
        self._tokens += len(z)
        self._logit_gram += z.T @ z
        self._logit_sum += z.sum(0)

    def add_choices(self, stored_ids: torch.Tensor) -> None:
        """The stored experts int64 [n, K] of n tokens, -1 for an empty slot."""
        experts = len(self._sums)
        hits = torch.zeros(len(stored_ids), experts + 1, dtype=torch.float64)
        hits.scatter_(1, torch.where(stored_ids < 0, experts, stored_ids), 1.0)
        hits = hits[:, :experts]
        self._coactivation += hits.T @ hits

    def add_outputs(self, expert: int, gates: torch.Tensor, outputs: torch.Tensor, hidden: torch.Tensor | None) -> None:
        """Outputs [n, H] and hidden activations [n, m] of an expert on n > 0 tokens with gates [n], each token once."""
        gates = gates.double()
        norms = torch.linalg.vector_norm(outputs, dim=1, dtype=torch.float64)
        squares, gated = norms.square(), gates.abs() * norms
        rows = torch.stack([torch.ones_like(gates), gates, norms, squares, gated, gated.square()])
        self._sums[expert] += rows.sum(1)
        self._output_sum[expert] += outputs.sum(0, dtype=torch.float64)
        self._output_max[expert] = torch.maximum(self._output_max[expert], outputs.abs().max().double())
        if hidden is None:
            return
        neurons = self._neurons[expert]
        squared = hidden.double().square()
        weights = torch.stack([gates.square(), torch.ones_like(gates)])
        neurons[:2] += weights @ squared
        largest = (squared * weights[0, :, None]).amax(0).sqrt()
        neurons[2] = torch.maximum(neurons[2], largest)

    def is_finite(self) -> bool:
        """Whether everything added so far was finite numbers."""
        return bool(self._sums.isfinite().all() and self._logit_sum.isfinite().all())

    def result(self, layer_gradient_energy: float | None = None) -> LayerStatistics:
        """The sums so far."""
        columns = dict(zip(_PER_EXPERT, self._sums.clone().unbind(1), strict=True))
        return LayerStatistics(
            tokens=self._tokens,
            coactivation=self._coactivation,
            logit_gram=self._logit_gram,
            logit_sum=self._logit_sum,
            output_max=self._output_max,
            output_sum=self._output_sum,
            neuron_gated_square=tuple(table[0] for table in self._neurons),
            neuron_square=tuple(table[1] for table in self._neurons),
            neuron_gated_max=tuple(table[2] for table in self._neurons),
            layer_gradient_energy=layer_gradient_energy,
            **columns,
        )
