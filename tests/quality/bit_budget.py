"""Budgets in which codes of few bits compete, against plans that treat all experts alike.

    python -m tests.quality.bit_budget [--model scratch]

What is asked: at a quarter of the bytes that the experts take in 16 bits at most .65 of the damage of the best uniform
plan that is as small, and at 15 % less than the uniform plans, interpolated.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import moec
from moec.artifact.options import OutputDType
from moec.budget.actions import Action, ActionKind, Offer
from moec.budget.measure import Distortion
from moec.budget.offers import TableSettings
from moec.budget.plan import BudgetPlan, ExpertPlan, LayerPlan
from moec.budget.tables import LayerTable, layer_table
from moec.experts import find_moe_layers
from tests.quality import harness
from tests.quality.harness import Measured

BITS = (8, 4, 3, 2)
MODELS = ("scratch", "upcycled")
BUDGETS = (0.25, 0.15)
_NEAR = 0.06
"""How far from a budget, in shares of the bytes, the uniform plans lie that are measured."""
_GROUP = 32


@dataclass(frozen=True)
class Point:
    """A plan as measured: `share` of the experts' bytes in 16 bits, and the increase of the loss in nats per byte."""

    name: str
    share: float
    increase: float


@dataclass(frozen=True)
class Comparison:
    """One budget of one model: the plan of the solver, and the uniform ones near it, by their bytes."""

    model: str
    budget: float
    solved: Point
    uniform: tuple[Point, ...]

    @property
    def best_uniform(self) -> Point:
        """The one of least damage among those that take no more than the budget and a hundredth of all bytes."""
        return min((p for p in self.uniform if p.share <= self.budget + 0.01), key=lambda p: p.increase)

    @property
    def frontier(self) -> float:
        """The damage of uniform plans at the bytes of the solved one, interpolated between the best on both sides."""
        ends = _frontier(self.uniform)
        return float(np.interp(self.solved.share, [p.share for p in ends], [p.increase for p in ends]))

    def line(self) -> str:
        """The comparison in words."""
        best = self.best_uniform
        return (
            f"{self.model:10}{self.budget:5.0%}  solved {self.solved.share:.2%} {self.solved.increase:+.4f}   best "
            f"uniform plan: {best.name} {best.share:.2%} {best.increase:+.4f}, ratio "
            f"{self.solved.increase / best.increase:.2f}   uniform plans at as many bytes {self.frontier:+.4f}"
        )


def compare(name: str, budgets: Sequence[float] = BUDGETS, seed: int = 0) -> list[Comparison]:
    """Measures the solver's plan for each budget, and all uniform plans near it."""
    solved = {budget: _solved(name, budget, seed) for budget in budgets}
    uniform = uniform_points(name, budgets, seed)
    return [
        Comparison(name, budget, point, tuple(p for p in uniform if abs(p.share - budget) <= _NEAR))
        for budget, point in solved.items()
    ]


def uniform_points(name: str, budgets: Sequence[float], seed: int = 0) -> list[Point]:
    """Plans that do the same to all experts: eighths of the neurons, in 16 bits or in codes, whichever are near."""
    module = harness.calibrated(name, seed, gradients=True)
    assert module.calibration is not None
    settings = TableSettings(
        frozenset({ActionKind.NARROW, ActionKind.QUANTIZE}),
        8,
        (),
        0,
        Distortion.AUTO.resolved(gradients=True),
        OutputDType.FLOAT16,
        refit=True,
        bits=BITS,
        group=_GROUP,
    )
    layers = find_moe_layers(module.op)
    tables = [layer_table(layer, module.calibration, settings) for layer in layers]
    found = []
    for action in [offer.action for offer in tables[0].experts[0].offers]:
        plan = _uniform_plan([layer.name for layer in layers], tables, action)
        if any(abs(plan.bytes / plan.source_bytes - budget) <= _NEAR for budget in budgets):
            found.append(_measured(name, _title(action), plan, seed))
    return sorted(found, key=lambda point: point.share)


def _solved(name: str, budget: float, seed: int) -> Point:
    flags = f"bytes={100 * budget:g}% dtype=float16 refit steps=8 actions=narrow,constant,zero,redirect"
    flags += f" bits={','.join(map(str, BITS))} group={_GROUP}"
    module = harness.calibrated(name, seed, gradients=True)
    moec.run_passes(module, f"solve-budget{{{flags}}},apply-plan,refit-down", seed=seed)
    return _point("solve-budget", harness.measure(name, module))


def _measured(name: str, title: str, plan: BudgetPlan, seed: int) -> Point:
    module = harness.calibrated(name, seed, gradients=True)
    module.plan = plan
    moec.run_passes(module, "apply-plan,refit-down", seed=seed)
    return _point(title, harness.measure(name, module))


def _point(title: str, measured: Measured) -> Point:
    return Point(title, measured.expert_share, measured.increase)


def _title(action: Action) -> str:
    width = "all neurons" if action.kind is not ActionKind.NARROW else f"{action.size} neurons"
    return f"{width}, {action.bits} bits" if action.bits else f"{width}, 16 bits"


def _frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no smaller one is as good as, by their bytes."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda item: (item.share, item.increase)):
        if not kept or point.increase < kept[-1].increase:
            kept.append(point)
    return kept


def _uniform_plan(names: Sequence[str], tables: Sequence[LayerTable], action: Action) -> BudgetPlan:
    layers = []
    for name, table in zip(names, tables, strict=True):
        chosen: list[tuple[int, Offer]] = []
        for expert in table.experts:
            # an expert without tokens has no offers but to stay
            offer = next((item for item in expert.offers if item.action == action), expert.offers[0])
            chosen.append((expert.expert, offer))
        layers.append(LayerPlan(layer=name, experts=tuple(_row(number, offer) for number, offer in chosen)))
    rows = [row for layer in layers for row in layer.experts]
    nbytes = sum(row.bytes for row in rows)
    return BudgetPlan(
        measure=Distortion.AUTO.resolved(gradients=True).value,
        solver="uniform",
        dtype=OutputDType.FLOAT16.value,
        group=_GROUP,
        refit=True,
        budget_bytes=nbytes,
        bytes=nbytes,
        source_bytes=sum(table.source_bytes for table in tables),
        budget_flops=None,
        flops=0.0,
        source_flops=sum(table.source_flops for table in tables),
        predicted=sum(row.distortion for row in rows),
        bound=0.0,
        gap=0.0,
        layers=tuple(layers),
    )


def _row(number: int, offer: Offer) -> ExpertPlan:
    return ExpertPlan(
        expert=number,
        action=offer.action.kind,
        size=offer.action.size,
        bits=offer.action.bits,
        bytes=offer.bytes,
        distortion=offer.distortion,
        neurons=offer.neurons,
    )


def main() -> None:
    """Reads the command line and prints the tables."""
    parser = argparse.ArgumentParser(description="Budgets with bits against uniform plans.")
    parser.add_argument("--model", choices=MODELS, action="append", help="only this fixture; may be repeated")
    print("increase of the held-out loss in nats per byte; shares of the bytes of the experts in 16 bits")
    for name in parser.parse_args().model or MODELS:
        found = compare(name)
        for point in sorted({p for item in found for p in item.uniform}, key=lambda p: p.share):
            print(f"{name:10}{point.name:24}{point.share:8.2%}{point.increase:+10.4f}", flush=True)
        for item in found:
            print(item.line(), flush=True)


if __name__ == "__main__":
    main()
