"""The loss of a model whose experts have the bits of a plan: measured, not estimated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from moec.calibration.data import CalibrationData
from moec.calibration.text_loss import text_loss
from moec.dialects.builtin import ModuleOp
from moec.experts import Dense, Expert, FeedForward, Matrix, MoeLayer, find_moe_layers, load_expert
from moec.experts.replicas import append_experts
from moec.module import Module
from moec.passes.factoring.sides import Side, dense_matrix, sides_of, with_matrices
from moec.quantization.rounding import Target, round_matrix

Unit = tuple[int, int]
"""(layer, stored expert)."""


class MeasuredPlans:
    """A copy of a module that holds every planned expert once for each choice of bits, rounded to nearest codes.

    `units` are the planned experts; a plan names a choice for each of them.
    """

    def __init__(self, module: Module, data: CalibrationData, units: Sequence[Unit], targets: Sequence[Target]) -> None:
        """Raises UsageError where a format does not fit an expert, or where the module has no store."""
        clone = module.op.clone()
        assert isinstance(clone, ModuleOp)
        self._copy = dataclasses.replace(module, op=clone)
        self._data = data
        self._layers: dict[int, MoeLayer] = {}
        self._tables: dict[int, tuple[int, ...]] = {}
        self._places: dict[tuple[Unit, int], int] = {}
        self._losses: dict[tuple[tuple[Unit, int], ...], float] = {}
        for layer in find_moe_layers(clone):
            members = [unit for unit in units if unit[0] == layer.index]
            more: list[Expert] = []
            for unit in members:
                expert = load_expert(layer, module.weights, unit[1])
                assert isinstance(expert, FeedForward)
                for choice, target in enumerate(targets):
                    self._places[unit, choice] = layer.expert_count + len(more)
                    more.append(_rounded(expert, target, f"{layer.name}, expert {unit[1]}"))
            if more:
                self._layers[layer.index] = append_experts(layer, module.weights, more)
                self._tables[layer.index] = layer.stored

    @property
    def measured(self) -> int:
        """Plans whose loss was measured."""
        return len(self._losses)

    def loss(self, plan: Mapping[Unit, int]) -> float:
        """Nats per token; the same plan is measured once."""
        key = tuple(sorted(plan.items()))
        if key not in self._losses:
            for number, layer in self._layers.items():
                places = {unit[1]: self._places[unit, choice] for unit, choice in plan.items() if unit[0] == number}
                layer.experts.stored = tuple(places.get(expert, expert) for expert in self._tables[number])
            self._losses[key] = text_loss(self._copy, self._data)
        return self._losses[key]


def _rounded(expert: FeedForward, target: Target, where: str) -> FeedForward:
    matrices: dict[Side, Matrix] = {
        side: Dense(round_matrix(target, dense_matrix(expert, side), where).dense()) for side in sides_of(expert)
    }
    return with_matrices(expert, matrices)
