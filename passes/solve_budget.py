"""One budget for all ways of making experts smaller."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from moec.budget.actions import Action, ActionKind
from moec.budget.lagrangian import solve_lagrangian
from moec.budget.measure import Distortion
from moec.budget.offers import TableSettings
from moec.budget.plan import BudgetPlan, ExpertPlan, LayerPlan, write_plan
from moec.budget.pricing import Pricing
from moec.budget.problem import OWN, Item, Problem, Solution
from moec.budget.sizes import format_size, parse_budget
from moec.budget.solving import Solver, solve
from moec.budget.tables import ExpertTable, LayerTable, layer_table
from moec.errors import UsageError
from moec.experts import MoeLayer, UnreadableExpertError, find_moe_layers, find_unreadable
from moec.ir import Operation
from moec.module import Module
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass
from moec.weights.output_type import OutputDType
from moec.weights.uses import weight_uses

_OFFERED = (ActionKind.NARROW, ActionKind.DELTA, ActionKind.CONSTANT, ActionKind.ZERO, ActionKind.REDIRECT)
_GOOD_BITS = 6
"""Experts in codes of fewer bits answer for no others (moec's own choice)."""
_PRICINGS = 8
"""So often at most a plan is solved with estimates, and what it chose is priced."""
_SHARES = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.75)


@register_pass("solve-budget")
@dataclass(frozen=True)
class SolveBudget(Pass):
    """Decides what becomes of each expert so that all of them fit a budget of bytes; `apply-plan` does it.

    For every expert the ways to make it smaller compete: fewer neurons, codes of few `bits` for all or fewer neurons,
    factored matrices, a difference of low rank from a mean that its layer stores once, a constant, nothing, or another
    expert of its layer that answers for it.
    Each is priced by the error that it makes in the layer's output on the calibration text, times the square of the
    expert's gate and how sensitive the loss is to that error, and takes the bytes that it will have in the artifact.
    Errors of different experts are added up.

    1. A share of `bytes` (60%) is one of the bytes of all experts, a number (4GiB) is for all weights of the model.
    2. Each layer keeps as many stored experts as a token chooses, protected experts stay as they are and serve no
       other's tokens, and an expert answers for another only if it keeps `good` of its neurons and at least 6 bits.
    3. With `refit` neurons are chosen, and they and ranks are priced, for what is left after `refit-down`: a neuron may
       go if those that stay can take its part over (as weights do in Optimal Brain Surgeon). Without a refit behind
       it such a plan is worse than one without `refit`.
    4. Codes are those of GPTQ and a round of descent. The last matrix of an expert has as many bits as the others or
       the next number of `bits`; with `refit` it makes up for the others before it is coded. Prices of all codes are
       estimated from second moments first. What a plan chooses by them is coded and priced as it comes out, with what
       lies beside it in bytes, until nothing in the plan is an estimate; so the bound is one on what was coded.
    5. Solvers: prices on bytes by bisection for any size; dynamic programming where experts are independent; HiGHS
       for redirects and for two budgets. The best plan is taken, and its distance from the proven bound is told.

    The plan is kept for `apply-plan`, and written to `file` as JSON.
    """

    claim: ClassVar[Claim] = Claim.EXACT
    anchor: ClassVar[str] = "builtin.module"
    kept = Statistic("experts that stay as they are")
    narrowed = Statistic("experts that lose neurons")
    packed = Statistic("experts that become codes of few bits, narrowed ones included")
    factored = Statistic("experts that are factored")
    deltas = Statistic("experts that become a difference from the mean of their layer")
    constants = Statistic("experts that become a constant")
    zeros = Statistic("experts that become nothing")
    redirected = Statistic("experts that another one answers for")
    codings = Statistic("experts coded to price them, each time for one offer")

    bytes: str = option("share of the experts' bytes, such as 60%, or bytes of all weights, such as 4GiB")
    flops: str = option("share of the experts' FLOPs per token, such as 80%; empty for any", "")
    actions: tuple[ActionKind, ...] = option("what may become of an expert", _OFFERED)
    steps: int = option("widths come in such parts of an expert", 16)
    ranks: tuple[float, ...] = option("shares of a matrix's parameters that factors may take", _SHARES)
    bits: tuple[int, ...] = option("bits of codes that matrices may become; none for no codes", ())
    group: int = option("inputs that share a scale where matrices become codes, if it divides them; else a row", 32)
    nearest: int = option("experts that may answer for another one", 8)
    good: float = option("share of its neurons that an expert must keep to answer for others", 0.75)
    refit: bool = option("prices are those after refit-down, which is to follow apply-plan", False)
    distortion: Distortion = option("how errors are made comparable", Distortion.AUTO)
    solver: Solver = option("how the plan is found", Solver.AUTO)
    nodes: int = option("nodes of the tree that HiGHS searches", 1000)
    gap: float = option("relative distance from the bound that is close enough", 1e-3)
    dtype: OutputDType = option("element type of the artifact", OutputDType.FLOAT32)
    file: Path | None = option("where the plan is written, too", None)

    def __post_init__(self) -> None:
        parse_budget(self.bytes)
        if self.flops and parse_budget(self.flops).share is None:
            raise ValueError(f"flops {self.flops} is no share such as 80%")
        if self.steps < 1 or self.nearest < 0:
            raise ValueError("steps must be at least 1 and nearest must not be negative")
        if not all(0 < share < 1 for share in self.ranks):
            raise ValueError("ranks are shares within 0 < share < 1")
        if not all(1 <= bits <= 8 for bits in self.bits) or self.group < 1:
            raise ValueError("codes have 1 to 8 bits, and group is at least 1")
        if ActionKind.QUANTIZE in self.actions and not self.bits:
            raise ValueError("say how many bits codes may have, such as bits=8,4,3,2")
        if not 0 < self.good <= 1 or self.nodes < 1 or not self.gap >= 0:
            raise ValueError("good is within 0 < good <= 1, nodes at least 1, and gap not negative")
        if self.refit and self.distortion is Distortion.FISHER:
            raise ValueError("refit needs a distortion that is a norm of outputs, which fisher is not")

    def run(self, op: Operation, context: PassContext) -> None:
        calibration = context.require_calibration()
        module = context.module
        assert module is not None
        for unreadable in find_unreadable(op):
            context.refuse(unreadable.op, unreadable.reason, self.pass_name)
        measure = self.distortion.resolved(gradients=calibration.has_gradients)
        settings = self._settings(measure)
        layers: list[MoeLayer] = []
        tables: list[LayerTable] = []
        for layer in find_moe_layers(op):
            try:
                tables.append(layer_table(layer, calibration, settings))
                layers.append(layer)
            except UnreadableExpertError as error:
                context.refuse(layer.experts, error.message, self.pass_name)
        if not layers:
            raise UsageError("there are no experts that a budget could be solved for", where="the module")
        problem = self._problem(module, layers, tables)
        self._require_feasible(problem, module, tables)
        pricing = Pricing(layers, calibration, settings, tables)
        for number in range(_PRICINGS if pricing.has_estimates else 0):
            solution = solve_lagrangian(problem) or solve(problem, self.solver, nodes=self.nodes, gap=self.gap)
            if not pricing.price(solution.choices, neighbours=not number):
                break
            problem = self._problem(module, layers, pricing.tables)
        tables = pricing.known()
        problem = self._problem(module, layers, tables)
        solution = solve(problem, self.solver, nodes=self.nodes, gap=self.gap)
        context.count(self.codings, pricing.codings)
        plan = self._plan(layers, tables, problem, solution, measure)
        module.plan = plan
        if self.file is not None:
            write_plan(self.file, plan)
        self._report(op, plan, context)

    def _settings(self, measure: Distortion) -> TableSettings:
        actions = frozenset((*self.actions, ActionKind.QUANTIZE) if self.bits else self.actions)
        bits = tuple(sorted(set(self.bits), reverse=True))
        return TableSettings(
            actions, self.steps, self.ranks, self.nearest, measure, self.dtype, self.refit, bits, self.group
        )

    # -- the problem --------------------

    def _problem(self, module: Module, layers: list[MoeLayer], tables: list[LayerTable]) -> Problem:
        source = sum(layer.source_bytes for layer in tables)
        budget = parse_budget(self.bytes)
        if budget.share is not None:
            allowed = int(budget.share * source)
        else:
            assert budget.bytes is not None
            allowed = budget.bytes - self._other_bytes(module, source)
        work = sum(layer.source_flops for layer in tables)
        flops = parse_budget(self.flops).share if self.flops else None
        items: list[Item] = []
        for group, layer in enumerate(tables):
            first = len(items)
            items += [self._item(group, table, first, first + len(layer.experts)) for table in layer.experts]
            if layer.base_bytes:
                items.append(_base_item(group, layer.base_bytes))
        least = tuple(
            min(layer.top_k, sum(bool(item.stored.any()) for item in items if item.group == group))
            for group, layer in enumerate(layers)
        )
        return Problem(tuple(items), allowed, None if flops is None else flops * work, least)

    def _item(self, group: int, table: ExpertTable, first: int, base: int) -> Item:
        actions = [offer.action for offer in table.offers]
        kinds = [action.kind for action in actions]

        def serves(action: Action) -> bool:
            fine = not action.bits or action.bits >= _GOOD_BITS
            wide = action.kind is not ActionKind.NARROW or action.size >= self.good * table.width
            return action.kind in (ActionKind.KEEP, ActionKind.NARROW, ActionKind.QUANTIZE) and fine and wide

        # constants of the source are stored, but are no experts that a token could choose for what they compute
        return Item(
            group,
            np.array([offer.bytes for offer in table.offers], np.int64),
            np.array([offer.flops for offer in table.offers]),
            np.array([offer.distortion for offer in table.offers]),
            np.array([_target(action, first, base) for action in actions], np.int64),
            np.array([kind.is_stored for kind in kinds]),
            np.array([serves(action) for action in actions]),
        )

    def _other_bytes(self, module: Module, experts: int) -> int:
        """Bytes of all weights but those of the experts of the problem."""
        total = 0
        for use in weight_uses(module):
            shape, kept = module.weights.shape_dtype(use.expression)
            # a packed matrix has elements in its codes alone, and all of its parts keep their types
            packed = not kept.is_floating_point or not use.elements
            each = self.dtype.itemsize if len(shape) > 1 else OutputDType.FLOAT32.itemsize
            total += use.bytes if packed else use.elements * each
        return total - experts

    def _require_feasible(self, problem: Problem, module: Module, tables: list[LayerTable]) -> None:
        least = problem.minimum_bytes()
        if least > problem.bytes:
            source = sum(layer.source_bytes for layer in tables)
            whole = least + self._other_bytes(module, source)
            raise UsageError(
                f"the budget of {self.bytes} is below the minimum: with what is offered, experts take at least "
                f"{format_size(least)} of {format_size(source)} ({least / source:.1%}), the model {format_size(whole)}",
                hint=f"give at least {-(-1000 * least // source) / 10:g}%, or {whole} bytes for the whole model; "
                "offer more actions, or protect fewer experts",
            )
        if problem.flops is not None and problem.minimum_flops() > problem.flops * (1 + 1e-9):
            raise UsageError(f"the budget of {self.flops} of the FLOPs is below the minimum with what is offered")

    # -- the outcome --------------------

    def _plan(
        self,
        layers: list[MoeLayer],
        tables: list[LayerTable],
        problem: Problem,
        solution: Solution,
        measure: Distortion,
    ) -> BudgetPlan:
        choices = iter(solution.choices)
        found = []
        for layer, tabled in zip(layers, tables, strict=True):
            rows = []
            for table in tabled.experts:
                offer = table.offers[next(choices)]
                rows.append(
                    ExpertPlan(
                        expert=table.expert,
                        action=offer.action.kind,
                        size=offer.action.size,
                        bits=offer.action.bits,
                        down_bits=offer.action.down_bits,
                        bytes=offer.bytes,
                        distortion=offer.distortion,
                        neurons=offer.neurons,
                    )
                )
            opened = bool(tabled.base_bytes) and next(choices) == 1
            base_bytes = tabled.base_bytes if opened else 0
            found.append(LayerPlan(layer=layer.name, base_bytes=base_bytes, experts=tuple(rows)))
        return BudgetPlan(
            measure=measure.value,
            solver=solution.name,
            dtype=self.dtype.value,
            group=self.group,
            refit=self.refit,
            budget_bytes=problem.bytes,
            bytes=problem.bytes_of(solution.choices),
            source_bytes=sum(layer.source_bytes for layer in tables),
            budget_flops=problem.flops,
            flops=problem.flops_of(solution.choices),
            source_flops=sum(layer.source_flops for layer in tables),
            predicted=solution.distortion,
            bound=solution.bound,
            gap=solution.gap,
            layers=tuple(found),
        )

    def _report(self, op: Operation, plan: BudgetPlan, context: PassContext) -> None:
        counts = plan.counts()
        for statistic, kind in (
            (self.kept, ActionKind.KEEP),
            (self.narrowed, ActionKind.NARROW),
            (self.factored, ActionKind.FACTOR),
            (self.deltas, ActionKind.DELTA),
            (self.constants, ActionKind.CONSTANT),
            (self.zeros, ActionKind.ZERO),
            (self.redirected, ActionKind.REDIRECT),
        ):
            context.count(statistic, counts.get(kind, 0))
        context.count(self.packed, sum(bool(expert.bits) for layer in plan.layers for expert in layer.experts))
        context.remark(op, plan.description())
        if plan.gap > self.gap:
            context.warn(op, f"the plan may be {plan.gap:.2%} from the best: allow more than nodes={self.nodes}")


def _target(action: Action, first: int, base: int) -> int:
    """The item that must stay for an action: another expert, or the mean of the layer."""
    if action.kind is ActionKind.REDIRECT:
        return first + action.size
    return base if action.kind is ActionKind.DELTA else OWN


def _base_item(group: int, size: int) -> Item:
    """The mean of a layer: not stored, or stored so that experts may be what they are beyond it."""
    return Item(
        group,
        np.array([0, size], np.int64),
        np.zeros(2),
        np.zeros(2),
        np.full(2, OWN),
        np.zeros(2, bool),
        np.array([False, True]),
    )
