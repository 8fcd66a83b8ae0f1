"""Bits for each expert, matrix or neuron."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

import numpy as np

from moec.errors import UsageError
from moec.experts import FeedForward, MoeLayer, UnreadableExpertError, find_moe_layers, find_unreadable, load_expert
from moec.ir import Operation
from moec.passes.bit_allocation.bands import bands_by_energy
from moec.passes.bit_allocation.costs import LayerCosts, Objective, dense, plannable, sides_of
from moec.passes.bit_allocation.solvers import Solver, Table, solve
from moec.passes.factoring.sides import Side
from moec.passes.neuron_pruning.scores import Criterion, NeuronScorer
from moec.passes.quantizing.choices import FormatOptions
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass
from moec.quantization.bit_plan import BitPlan, ExpertBits
from moec.quantization.rounding import Target


class Unit(Enum):
    """What gets bits of its own: an expert, each of its matrices, or bands of its neurons."""

    EXPERT = "expert"
    PROJECTION = "projection"
    MICRO = "micro"


class Scope(Enum):
    """What the average is kept for: each layer, or all layers together."""

    LAYER = "layer"
    MODEL = "model"


@register_pass("allocate-bits")
@dataclass(frozen=True)
class AllocateBits(Pass):
    """Chooses how many bits experts get, so that their average keeps to a budget; `quantize{planned}` packs them so.

    1. Experts or matrices: each choice is rounded to nearest codes and costed on the rows of the calibration that
       chose the expert, by `objective`; the choices of least total cost are found by dynamic programming, which is
       exact, or greedily. `at-least=3:1,2:1` makes one expert or matrix of each scope take 3 bits at least in number,
       and one 2 bits (MC-MoE).
    2. Neurons (CAMERA-Q, arXiv 2508.02322): all neurons of a layer are ranked by their energy; the first of `shares`
       gets the first of `bits`, and so on. In each expert they are ordered so, which changes nothing, and the bands of
       gate, up and down are packed alone; the number of neurons in a band is a multiple of the group.

    Only codes count for the average: scales take the same whatever the bits. Experts that are protected, packed or
    factored are left out. It changes nothing itself.
    """

    claim: ClassVar[Claim] = Claim.EXACT
    anchor: ClassVar[str] = "builtin.module"
    planned = Statistic("experts that the plan has bits for")

    unit: Unit = option("what gets bits of its own", Unit.EXPERT)
    objective: Objective = option("cost of a choice", Objective.OUTPUT)
    solver: Solver = option("how the best choices are found", Solver.DP)
    scope: Scope = option("what the average is kept for", Scope.LAYER)
    average: float = option("bits per weight that codes may take on average", 3.0)
    bits: tuple[int, ...] = option("bits to choose from; micro: those of the bands", (2, 3, 4))
    at_least: tuple[str, ...] = option("bits:number pairs, how many units take these bits at least", ())
    shares: tuple[float, ...] = option("micro: shares of the neurons that get each of `bits`", (0.1, 0.3, 0.6))
    alpha: float = option("micro: weight of the largest activation against the sum of squares", 1.0)
    group: str = option("as quantize will be told", "32")
    symmetric: bool = option("as quantize will be told", False)

    def __post_init__(self) -> None:
        if not self.bits or len(set(self.bits)) < len(self.bits):
            raise ValueError("bits must be different numbers")
        for bits in self.bits:
            FormatOptions(bits=bits, group=self.group, symmetric=self.symmetric).target()
        if self.unit is Unit.MICRO:
            if len(self.shares) != len(self.bits) or abs(sum(self.shares) - 1) > 1e-6 or min(self.shares) < 0:
                raise ValueError("shares must be one per choice of bits, not negative, and add to 1")
        elif self.average < min(self.bits):
            raise ValueError(f"an average of {self.average:g} bits is below the smallest choice, {min(self.bits)}")
        self._least()

    def _least(self) -> dict[int, int]:
        """For each choice how many units take it at least."""
        found = {}
        for pair in self.at_least:
            bits, _, count = pair.partition(":")
            if not bits.isdigit() or int(bits) not in self.bits or not count.isdigit():
                raise ValueError(f"at-least {pair!r} is no pair such as {self.bits[0]}:1, of one of the choices")
            found[self.bits.index(int(bits))] = int(count)
        return found

    def run(self, op: Operation, context: PassContext) -> None:
        if context.module is None:
            raise UsageError("there is no model to plan for", hint="name it with --source, or use `moec compile`")
        for unreadable in find_unreadable(op):
            context.refuse(unreadable.op, unreadable.reason, self.pass_name)
        layers = [self._survey(layer, context) for layer in find_moe_layers(op)]
        scopes = [layers] if self.scope is Scope.MODEL else [[layer] for layer in layers]
        plans: dict[str, tuple[ExpertBits | None, ...]] = {}
        spent = weights = 0
        cost = 0.0
        for scope in scopes:
            if self.unit is Unit.MICRO:
                for survey in scope:
                    self._by_energy(survey, context)
            elif any(survey.units for survey in scope):
                cost += self._by_cost(scope)
            for survey in scope:
                plans[survey.layer.name] = tuple(survey.bits)
                spent += survey.spent()
                weights += sum(survey.weights.values())
                context.count(self.planned, len(survey.weights))
                context.remark(survey.layer.experts, survey.text())
        context.module.bits = BitPlan(plans, spent / max(weights, 1), cost)

    def _survey(self, layer: MoeLayer, context: PassContext) -> _Survey:
        """Costs and sizes of one layer."""
        weights, calibration = context.require_weights(), context.require_calibration()
        costs = LayerCosts(layer, calibration.sample(layer), self.objective)
        targets = [self._target(bits) for bits in self.bits]
        survey = _Survey(layer, [None] * layer.expert_count)
        for number in sorted(set(range(layer.expert_count)) - layer.protected):
            try:
                expert = load_expert(layer, weights, number)
            except UnreadableExpertError as error:
                context.refuse(layer.experts, error.message, self.pass_name)
                continue
            if not isinstance(expert, FeedForward) or not plannable(expert):
                context.refuse(layer.experts, f"stored expert {number} has other than dense matrices", self.pass_name)
                continue
            sides = sides_of(expert)
            survey.weights[number] = sum(dense(expert, side).numel() for side in sides)
            survey.widths[number] = expert.width
            if self.unit is Unit.MICRO:
                continue
            try:
                found = costs.of(number, expert, targets, by_side=self.unit is Unit.PROJECTION)
            except UsageError as error:
                raise UsageError(error.message, where=f"{layer.name}, expert {number}", hint=error.hint) from error
            units = [[side] for side in sides] if self.unit is Unit.PROJECTION else [sides]
            for members, row in zip(units, found, strict=True):
                size = sum(dense(expert, side).numel() for side in members)
                survey.units.append(_Unit(number, tuple(members), size, tuple(row)))
        return survey

    def _target(self, bits: int) -> Target:
        return FormatOptions(bits=bits, group=self.group, symmetric=self.symmetric).target()

    def _by_cost(self, scope: Sequence[_Survey]) -> float:
        """Fills in the bits of the layers of one scope; gives the cost of the choices."""
        units = [(survey, unit) for survey in scope for unit in survey.units]
        sizes = np.asarray([[unit.size * bits for bits in self.bits] for _, unit in units], np.int64)
        costs = np.asarray([unit.costs for _, unit in units], np.float64)
        budget = int(self.average * sum(unit.size for _, unit in units) + 1e-6)
        table = Table(costs, sizes, budget, self._least())
        choices = solve(table, self.solver)
        if choices is None:
            raise UsageError(
                f"no choice of bits keeps to {self.average:g} on average and to at-least",
                where=scope[0].layer.name,
                hint="allow more bits, or ask for fewer",
            )
        for (survey, unit), choice in zip(units, choices, strict=True):
            survey.choose(unit, self.bits[choice])
        return table.cost(choices)

    def _by_energy(self, survey: _Survey, context: PassContext) -> None:
        scorer = NeuronScorer(Criterion.CAMERA, context.require_calibration(), alpha=self.alpha)
        weights, numbers = context.require_weights(), list(survey.weights)
        energies = []
        for number in numbers:
            expert = load_expert(survey.layer, weights, number)
            assert isinstance(expert, FeedForward)
            energies.append(scorer.scores(survey.layer, number, expert))
        multiple = int(self.group) if self.group.isdigit() else 1
        for number in numbers:
            if survey.widths[number] % multiple:
                raise UsageError(
                    f"groups of {multiple} do not divide {survey.widths[number]} neurons",
                    where=f"{survey.layer.name}, expert {number}",
                )
        if numbers:
            for number, bits in zip(numbers, bands_by_energy(energies, self.bits, self.shares, multiple), strict=True):
                survey.bits[number] = bits


@dataclass(frozen=True)
class _Unit:
    """What gets one choice: some matrices of an expert, `size` weights in all, and the cost of each choice."""

    expert: int
    sides: tuple[Side, ...]
    size: int
    costs: tuple[float, ...]


@dataclass
class _Survey:
    """One layer: the bits of its experts so far, and of those that are planned the weights and widths."""

    layer: MoeLayer
    bits: list[ExpertBits | None]
    weights: dict[int, int] = field(default_factory=dict)
    widths: dict[int, int] = field(default_factory=dict)
    units: list[_Unit] = field(default_factory=list)

    def choose(self, unit: _Unit, bits: int) -> None:
        """Gives bits to a unit."""
        before = self.bits[unit.expert] or ExpertBits()
        own = {side: bits if side in unit.sides else getattr(before, side.value) for side in Side}
        self.bits[unit.expert] = ExpertBits(own[Side.GATE], own[Side.UP], own[Side.DOWN])

    def spent(self) -> int:
        """Bits of all codes."""
        bands = sum(
            self.weights[number] // self.widths[number] * len(band.neurons) * band.bits
            for number, found in enumerate(self.bits)
            if found is not None
            for band in found.bands
        )
        plain = 0
        for unit in self.units:
            found = self.bits[unit.expert]
            assert found is not None
            plain += unit.size // len(unit.sides) * sum(getattr(found, side.value) for side in unit.sides)
        return bands + plain

    def text(self) -> str:
        """The bits of each expert in a line."""
        words = []
        for found in self.bits:
            if found is None:
                words.append("-")
            elif found.bands:
                words.append("+".join(f"{len(band.neurons)}x{band.bits}" for band in found.bands))
            else:
                own = [bits for bits in (found.gate, found.up, found.down) if bits]
                words.append(str(own[0]) if len(set(own)) == 1 else "/".join(map(str, own)))
        return f"bits of the experts: {' '.join(words)}"
