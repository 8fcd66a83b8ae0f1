"""Bits for each expert, matrix or neuron."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cache
from itertools import combinations
from typing import ClassVar

import numpy as np

from moec.errors import UnsafeInputError, UsageError
from moec.experts import FeedForward, MoeLayer, UnreadableExpertError, find_moe_layers, find_unreadable, load_expert
from moec.ir import Operation
from moec.passes.bit_allocation.bands import bands_by_energy
from moec.passes.bit_allocation.costs import LayerCosts, Objective
from moec.passes.bit_allocation.measured import MeasuredPlans
from moec.passes.bit_allocation.measured import Unit as MeasuredUnit
from moec.passes.bit_allocation.orders import Sensitivities, longest_prefix
from moec.passes.bit_allocation.solvers import Solver, Table, solve
from moec.passes.factoring.sides import Side, dense_matrix, has_dense_matrices, sides_of
from moec.passes.neuron_pruning.scores import Criterion, NeuronScorer
from moec.passes.quantizing.choices import Coding, FormatOptions
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
       exact, or greedily. With `method=gptq` the codes that `quantize{method=gptq}` would make are costed, which fits
       what it makes better, and takes as many times as long as there are choices. `at-least=3:1,2:1` makes one expert
       or matrix of each scope take 3 bits at least in number, and one 2 bits (MC-MoE).
    2. Neurons (CAMERA-Q, arXiv 2508.02322): all neurons of a layer are ranked by their energy; the first of `shares`
       gets the first of `bits`, and so on. In each expert they are ordered so, which changes nothing, and the bands of
       gate, up and down are packed alone; the number of neurons in a band is a multiple of the group.

    3. `objective=single-drop` and `pairwise` measure the loss of the model on the calibration text with experts rounded
       to nearest codes, of two numbers of bits: all start with more, and those that cost least get fewer one after the
       other, over all layers. `pairwise` measures pairs in layers at most `pair-window` apart, too.
    4. `max-loss` instead of an average: the most experts with fewer bits, or for other objectives the smallest average,
       whose measured loss is at most so far above that with most bits, found by halving. The loss is measured for the
       plan that is taken and for the next one.

    Only codes count for the average: scales take the same whatever the bits. Experts that are protected, packed or
    factored are left out. It changes nothing itself.
    """

    claim: ClassVar[Claim] = Claim.EXACT
    anchor: ClassVar[str] = "builtin.module"
    planned = Statistic("experts that the plan has bits for")
    measured = Statistic("plans whose loss was measured")

    unit: Unit = option("what gets bits of its own", Unit.EXPERT)
    objective: Objective = option("cost of a choice", Objective.OUTPUT)
    method: Coding = option("output, pmq: codes that are costed, as quantize will be told", Coding.RTN)
    solver: Solver = option("how the best choices are found", Solver.DP)
    scope: Scope = option("what the average is kept for", Scope.LAYER)
    average: float = option("bits per weight that codes may take on average", 3.0)
    max_loss: float | None = option("instead of average: largest rise of the measured loss, in nats per token", None)
    pair_window: int = option("pairwise: layers that two experts are apart at most", 0)
    sequences: int = option("sequences of the calibration text that losses are measured on at most", 32)
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
        elif self.max_loss is None and self.average < min(self.bits):
            raise ValueError(f"an average of {self.average:g} bits is below the smallest choice, {min(self.bits)}")
        self._least()
        if self.max_loss is not None and self.max_loss < 0:
            raise ValueError(f"max-loss {self.max_loss:g} is negative")
        if self.pair_window < 0 or self.sequences < 1:
            raise ValueError("pair-window must not be negative, and sequences must be at least 1")
        if self._measures and self.unit is not Unit.EXPERT:
            raise ValueError("losses are measured of whole experts: take unit=expert")
        is_error = self.objective in (Objective.OUTPUT, Objective.PMQ) and self.max_loss is None
        if self.method is Coding.GPTQ and (self.unit is Unit.MICRO or not is_error):
            raise ValueError("method=gptq is for an average of experts or matrices, with objective=output or pmq")
        if self.objective.is_measured and (len(self.bits) != 2 or self.at_least):
            raise ValueError(f"{self.objective.value} chooses between two numbers of bits, such as bits=2,4")

    @property
    def _measures(self) -> bool:
        """Whether losses of the model decide."""
        return self.max_loss is not None or self.objective.is_measured

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
        if self._measures and any(survey.units for survey in layers):
            cost = self._by_loss(op, layers, scopes, context)
        for scope in scopes:
            if self.unit is Unit.MICRO:
                for survey in scope:
                    self._by_energy(survey, context)
            elif any(survey.units for survey in scope) and not self._measures:
                cost += self._by_cost(scope, self.average)
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
        costs = LayerCosts(layer, calibration.sample(layer), self.objective, self.method)
        targets = [self._target(bits) for bits in self.bits]
        survey = _Survey(layer, [None] * layer.expert_count)
        for number in sorted(set(range(layer.expert_count)) - layer.protected):
            try:
                expert = load_expert(layer, weights, number)
            except UnreadableExpertError as error:
                context.refuse(layer.experts, error.message, self.pass_name)
                continue
            if not isinstance(expert, FeedForward) or not has_dense_matrices(expert):
                context.refuse(layer.experts, f"stored expert {number} has other than dense matrices", self.pass_name)
                continue
            sides = sides_of(expert)
            survey.weights[number] = sum(dense_matrix(expert, side).numel() for side in sides)
            survey.widths[number] = expert.width
            if self.unit is Unit.MICRO:
                continue
            if self.objective.is_measured:
                survey.units.append(_Unit(number, tuple(sides), survey.weights[number], ()))
                continue
            try:
                found = costs.of(number, expert, targets, by_side=self.unit is Unit.PROJECTION)
            except (UsageError, UnsafeInputError) as error:
                raise type(error)(error.message, where=f"{layer.name}, expert {number}", hint=error.hint) from error
            units = [[side] for side in sides] if self.unit is Unit.PROJECTION else [sides]
            for members, row in zip(units, found, strict=True):
                size = sum(dense_matrix(expert, side).numel() for side in members)
                survey.units.append(_Unit(number, tuple(members), size, tuple(row)))
        return survey

    def _target(self, bits: int) -> Target:
        return FormatOptions(bits=bits, group=self.group, symmetric=self.symmetric).target()

    def _by_loss(
        self, op: Operation, layers: Sequence[_Survey], scopes: Sequence[Sequence[_Survey]], context: PassContext
    ) -> float:
        """Fills in the bits of all layers by measured losses; gives the rise of the loss."""
        assert context.module is not None
        data = context.require_calibration().data
        units = [(survey.layer.index, unit.expert) for survey in layers for unit in survey.units]
        plans = MeasuredPlans(
            context.module,
            replace(data, sequences=data.sequences[: self.sequences]),
            units,
            [self._target(bits) for bits in self.bits],
        )
        most, least = self.bits.index(max(self.bits)), self.bits.index(min(self.bits))
        order: list[int] = []
        if self.objective.is_measured:
            order = self._sensitivities(plans, units, most, least).order()

        @cache
        def plan(count: int) -> dict[MeasuredUnit, int]:
            """The choices with `count` steps down from most bits for all."""
            if order:
                fewer = {units[place] for place in order[:count]}
                return {unit: least if unit in fewer else most for unit in units}
            average = max(self.bits) - count * (max(self.bits) - min(self.bits)) / len(units)
            for scope in scopes:
                if any(survey.units for survey in scope):
                    self._by_cost(scope, average)
            return {
                (survey.layer.index, unit.expert): self.bits.index(survey.bits_of(unit))
                for survey in layers
                for unit in survey.units
            }

        def loss(count: int) -> float:
            return plans.loss(plan(count))

        source = loss(0)
        if self.max_loss is None:
            sizes = {(survey.layer.index, unit.expert): unit.size for survey in layers for unit in survey.units}
            budget = self.average * sum(sizes.values()) + 1e-6
            spent = [sum(sizes[unit] * self.bits[at] for unit, at in plan(n).items()) for n in range(len(units) + 1)]
            count = next(number for number, size in enumerate(spent) if size <= budget)
        else:
            count = longest_prefix(len(units), loss, source + self.max_loss)
        for survey in layers:
            for unit in survey.units:
                survey.choose(unit, self.bits[plan(count)[survey.layer.index, unit.expert]])
        rise = loss(count) - source
        following = f", {loss(count + 1) - source:+.4f} with the next one" if count < len(units) else ""
        context.count(self.measured, plans.measured)
        context.remark(
            op,
            f"loss {source:.4f} with {max(self.bits)} bits for all, {rise:+.4f} with {count} of {len(units)} steps down"
            f"{following}",
        )
        return rise

    def _sensitivities(
        self, plans: MeasuredPlans, units: Sequence[MeasuredUnit], most: int, least: int
    ) -> Sensitivities:
        """Losses with one expert, or two of them, in the least bits, above that with none."""

        def rise(*places: int) -> float:
            fewer = {units[place] for place in places}
            return plans.loss({unit: least if unit in fewer else most for unit in units}) - source

        source = plans.loss(dict.fromkeys(units, most))
        singles = [rise(place) for place in range(len(units))]
        pairs = {}
        if self.objective is Objective.PAIRWISE:
            for i, j in combinations(range(len(units)), 2):
                if abs(units[i][0] - units[j][0]) <= self.pair_window:
                    pairs[i, j] = rise(i, j) - singles[i] - singles[j]
        return Sensitivities(singles, pairs)

    def _by_cost(self, scope: Sequence[_Survey], average: float) -> float:
        """Fills in the bits of the layers of one scope; gives the cost of the choices."""
        units = [(survey, unit) for survey in scope for unit in survey.units]
        sizes = np.asarray([[unit.size * bits for bits in self.bits] for _, unit in units], np.int64)
        costs = np.asarray([unit.costs for _, unit in units], np.float64)
        budget = int(average * sum(unit.size for _, unit in units) + 1e-6)
        table = Table(costs, sizes, budget, self._least())
        choices = solve(table, self.solver)
        if choices is None:
            raise UsageError(
                f"no choice of bits keeps to {average:g} on average and to at-least",
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

    def bits_of(self, unit: _Unit) -> int:
        """The bits that a unit was given."""
        found = self.bits[unit.expert]
        assert found is not None
        bits: int = getattr(found, unit.sides[0].value)
        return bits

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
