"""Budgets in which codes of few bits compete, against plans that treat all experts alike.

    python -m tests.quality.bit_budget [--model scratch]

What is asked: at a quarter of the bytes that the experts take in 16 bits at most .65 of the damage of the best uniform
plan that is as small, and at 15 % less than the uniform plans, interpolated. A uniform plan is one width and one number
of bits; those whose last matrices have the next number of bits, as the solver may choose, too, are a second family.
All plans come from the same codes, refit included.

Damage is the divergence of a model's predictions on held-out text from the source's, and beside it the increase of the
loss: at 25 % that is so small that it differs by half between equal plans of two seeds.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

import moec
from moec.artifact.options import OutputDType
from moec.budget.actions import Action, ActionKind
from moec.budget.measure import Distortion
from moec.budget.offers import TableSettings
from moec.budget.plan import BudgetPlan, ExpertPlan, LayerPlan
from moec.budget.tables import ExpertTable, LayerTable, layer_table
from moec.experts import find_moe_layers
from moec.module import Module
from tests.quality import harness
from tests.quality.harness import FIXTURES

BITS = (8, 6, 5, 4, 3, 2)
MODELS = ("scratch", "upcycled")
BUDGETS = (0.25, 0.15)
_NEAR = 0.06
"""How far from a budget, in shares of the bytes, the uniform plans lie that are measured."""
_GROUP = 32
_STEPS = 8
_WINDOWS = 640
_SCALES = 16
"""Bits of a scale; with a zero point of as many bits as codes have."""


@dataclass(frozen=True)
class Point:
    """A plan as measured: `share` of the experts' bytes in 16 bits, and in nats per byte the divergence from the source
    and the increase of the loss."""

    name: str
    share: float
    divergence: float
    increase: float
    is_mixed: bool = False
    """Whether the last matrices have more bits than the others."""


Damage = Callable[[Point], float]


def divergence(point: Point) -> float:
    """Damage that is told from chance."""
    return point.divergence


def increase(point: Point) -> float:
    """Damage by the text."""
    return point.increase


@dataclass(frozen=True)
class Comparison:
    """One budget of one model: the plan of the solver, and the uniform ones near it, by their bytes."""

    model: str
    budget: float
    solved: Point
    uniform: tuple[Point, ...]

    def best_uniform(self, damage: Damage = divergence, *, mixed: bool) -> Point:
        """The one of least damage among those that take no more than the budget and a hundredth of all bytes."""
        near = [point for point in self.uniform if point.share <= self.budget + 0.01]
        return min((point for point in near if point.is_mixed is mixed), key=damage)

    def frontier(self, damage: Damage = divergence) -> float:
        """The damage of uniform plans at the bytes of the solved one, interpolated between the best on both sides."""
        ends = _frontier(self.uniform, damage)
        return float(np.interp(self.solved.share, [p.share for p in ends], [damage(p) for p in ends]))

    def lines(self) -> Iterator[str]:
        """The comparison in words."""
        for title, damage in (("divergence", divergence), ("loss", increase)):
            text = f"{self.model:10}{self.budget:5.0%} {title:10} solved {self.solved.share:.2%} "
            text += f"{damage(self.solved):+.5f}"
            for mixed in (False, True):
                best = self.best_uniform(damage, mixed=mixed)
                ratio = damage(self.solved) / damage(best)
                text += f"   {best.name} {best.share:.2%} {damage(best):+.5f}, ratio {ratio:.2f}"
            yield f"{text}   uniform plans at as many bytes {self.frontier(damage):+.5f}"


def compare(name: str, budgets: Sequence[float] = BUDGETS, seed: int = 0) -> list[Comparison]:
    """Measures the solver's plan for each budget, and all uniform plans near it."""
    solved = {budget: _solved(name, budget, seed) for budget in budgets}
    uniform = uniform_points(name, budgets, seed)
    return [
        Comparison(name, budget, point, tuple(p for p in uniform if abs(p.share - budget) <= _NEAR))
        for budget, point in solved.items()
    ]


def uniform_points(name: str, budgets: Sequence[float], seed: int = 0) -> list[Point]:
    """Plans that do the same to all experts: eighths of the neurons in codes of some bits, whichever are near."""
    module = harness.calibrated(name, seed, gradients=True)
    assert module.calibration is not None
    distortion = Distortion.AUTO.resolved(gradients=True)
    settings = TableSettings(
        frozenset({ActionKind.NARROW}), _STEPS, (), 0, distortion, OutputDType.FLOAT16, refit=True, group=_GROUP
    )
    layers = find_moe_layers(module.op)
    tables = [layer_table(layer, module.calibration, settings) for layer in layers]
    width = tables[0].experts[0].width
    found = []
    for action in _uniform_actions(width):
        stored = action.bits + (action.down_bits - action.bits) / 3 + (_SCALES + action.bits) / _GROUP
        share = (action.size or width) / width * stored / 16
        if any(abs(share - budget) <= _NEAR for budget in budgets):
            plan = _uniform_plan([layer.name for layer in layers], tables, action)
            found.append(_measured(name, action, plan, seed))
    return sorted(found, key=lambda point: point.share)


def _uniform_actions(width: int) -> list[Action]:
    wide = [(ActionKind.QUANTIZE, 0), *((ActionKind.NARROW, width * step // _STEPS) for step in range(1, _STEPS))]
    numbers = sorted(BITS)
    pairs = [*zip(numbers, numbers, strict=True), *pairwise(numbers)]
    return [Action(kind, size, bits, down) for kind, size in wide for bits, down in pairs]


def _solved(name: str, budget: float, seed: int) -> Point:
    flags = f"bytes={100 * budget:g}% dtype=float16 refit steps={_STEPS} actions=narrow,constant,zero,redirect"
    flags += f" bits={','.join(map(str, BITS))} group={_GROUP}"
    module = harness.calibrated(name, seed, gradients=True)
    moec.run_passes(module, f"solve-budget{{{flags}}},apply-plan,refit-down", seed=seed)
    return _point("solve-budget", name, module)


def _measured(name: str, action: Action, plan: BudgetPlan, seed: int) -> Point:
    module = harness.calibrated(name, seed, gradients=True)
    module.plan = plan
    moec.run_passes(module, "apply-plan,refit-down", seed=seed)
    return replace(_point(_title(action), name, module), is_mixed=action.bits != action.down_bits)


def _point(title: str, name: str, module: Module) -> Point:
    found, source = _predict(name, module), _source(name)
    share = harness.expert_bytes(module) / harness.expert_bytes(harness.load(name))
    return Point(title, share, source.divergence(found), float(found.losses().mean() - source.losses().mean()))


def _predict(name: str, module: Module) -> harness.Predictions:
    return harness.predict(module, FIXTURES[name].heldout, sequences=_WINDOWS)


@functools.cache
def _source(name: str) -> harness.Predictions:
    return _predict(name, harness.load(name))


def _title(action: Action) -> str:
    width = "all neurons" if action.kind is not ActionKind.NARROW else f"{action.size} neurons"
    return f"{width}, {action.bits}{f'/{action.down_bits}' if action.down_bits != action.bits else ''} bits"


def _frontier(points: Sequence[Point], damage: Damage) -> list[Point]:
    """The points that no smaller one is as good as, by their bytes."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda item: (item.share, damage(item))):
        if not kept or damage(point) < damage(kept[-1]):
            kept.append(point)
    return kept


def _uniform_plan(names: Sequence[str], tables: Sequence[LayerTable], action: Action) -> BudgetPlan:
    layers = []
    for name, table in zip(names, tables, strict=True):
        rows = tuple(_row(expert, action) for expert in table.experts)
        layers.append(LayerPlan(layer=name, experts=rows))
    return BudgetPlan(
        measure=Distortion.AUTO.resolved(gradients=True).value,
        solver="uniform",
        dtype=OutputDType.FLOAT16.value,
        group=_GROUP,
        refit=True,
        budget_bytes=0,
        bytes=0,
        source_bytes=sum(table.source_bytes for table in tables),
        budget_flops=None,
        flops=0.0,
        source_flops=sum(table.source_flops for table in tables),
        predicted=0.0,
        bound=0.0,
        gap=0.0,
        layers=tuple(layers),
    )


def _row(table: ExpertTable, action: Action) -> ExpertPlan:
    """The action for an expert, which keeps the neurons that the solver would keep."""
    neurons: tuple[int, ...] = ()
    if action.kind is ActionKind.NARROW:
        (neurons,) = (offer.neurons for offer in table.offers if offer.action == replace(action, bits=0, down_bits=0))
    return ExpertPlan(
        expert=table.expert,
        action=action.kind,
        size=action.size,
        bits=action.bits,
        down_bits=action.down_bits,
        bytes=0,
        distortion=0.0,
        neurons=neurons,
    )


def main() -> None:
    """Reads the command line and prints the tables."""
    parser = argparse.ArgumentParser(description="Budgets with bits against uniform plans.")
    parser.add_argument("--model", choices=MODELS, action="append", help="only this fixture; may be repeated")
    print("divergence and increase of the held-out loss, nats per byte; shares of the bytes of the experts in 16 bits")
    for name in parser.parse_args().model or MODELS:
        found = compare(name)
        for point in sorted({p for item in found for p in item.uniform}, key=lambda p: p.share):
            numbers = f"{point.share:8.2%}{point.divergence:10.5f}{point.increase:+10.5f}"
            print(f"{name:10}{point.name:24}{numbers}", flush=True)
        for item in found:
            print(*item.lines(), sep="\n", flush=True)


if __name__ == "__main__":
    main()
