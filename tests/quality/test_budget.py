"""One budget for all: against the best recipe of one family, and whether its predictions can be trusted."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

import moec
from moec.artifact.options import OutputDType
from moec.budget.actions import ActionKind
from moec.budget.measure import Distortion
from moec.budget.offers import TableSettings
from moec.budget.plan import BudgetPlan
from moec.budget.tables import LayerTable, layer_table
from moec.experts import find_moe_layers
from tests.quality import harness
from tests.quality.harness import Measured, paired_interval

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("quality budget")]

MODELS = ("scratch", "upcycled")
TOLERANCE = 0.002
BUDGET = "solve-budget{{bytes={keep:.0%}}},apply-plan,refit-down"
# the strongest recipes of their families on these models; `make quality` prints all of them
RIVALS = (
    "prune-micro-experts{{criterion=heapr-sum scope=global ratio={drop:g}}},refit-down",
    "prune-micro-experts{{criterion=energy-x-sensitivity scope=global ratio={drop:g}}},refit-down",
    "merge-experts{{keep={keep:g} grouping=facility keep-dominant select=global}},refit-down",
    "low-rank{{ratio={keep:g} base=frequency}},refit-down",
)


@pytest.mark.parametrize("keep", [0.75, 0.5, 0.25])
@pytest.mark.parametrize("name", MODELS)
def test_the_budget_is_not_worse_than_the_best_family(name: str, keep: float) -> None:
    found = run(name, BUDGET.format(keep=keep, drop=1 - keep))
    assert found.expert_share <= keep
    rivals = [run(name, rival.format(keep=keep, drop=1 - keep)) for rival in RIVALS]
    best = min(rivals, key=lambda rival: rival.increase)
    _, upper = paired_interval(found, best)
    print(f"{name} {keep:.0%}: budget {found.increase:+.4f}, best family {best.increase:+.4f}, upper {upper:+.4f}")
    assert found.increase <= best.increase + TOLERANCE


def run(name: str, pipeline: str) -> Measured:
    module = harness.calibrated(name, gradients=True)
    moec.run_passes(module, pipeline)
    return harness.measure(name, module)


@pytest.mark.parametrize("name", MODELS)
def test_predictions_rank_random_plans(name: str) -> None:
    """20 plans over 10 to 90 % of the bytes, mixed of all actions at random; neither solved nor refitted."""
    tables = [layer_table(layer, calibration_of(name), SETTINGS) for layer in layers_of(name)]
    generator = np.random.default_rng(7)
    predicted, measured, shares = [], [], []
    for share in np.linspace(0.1, 0.9, 20):
        module = harness.calibrated(name, gradients=True)
        moec.run_passes(module, "solve-budget{bytes=100%}")
        assert module.plan is not None
        module.plan = random_plan(module.plan, tables, float(share), generator)
        moec.run_passes(module, "apply-plan")
        predicted.append(module.plan.predicted)
        measured.append(harness.measure(name, module).increase)
        shares.append(module.plan.bytes / module.plan.source_bytes)
    correlation = float(spearmanr(predicted, measured).statistic)
    print(f"{name}: Spearman {correlation:.3f}, shares {min(shares):.2f} to {max(shares):.2f}")
    assert correlation >= 0.9
    assert min(shares) < 0.2 and max(shares) > 0.8


SETTINGS = TableSettings(
    frozenset({ActionKind.NARROW, ActionKind.CONSTANT, ActionKind.ZERO, ActionKind.REDIRECT, ActionKind.FACTOR}),
    8,
    (0.25, 0.5),
    4,
    Distortion.CURVATURE,
    OutputDType.FLOAT32,
)


def calibration_of(name: str):  # type: ignore[no-untyped-def]
    return harness.calibrated(name, gradients=True).calibration


def layers_of(name: str):  # type: ignore[no-untyped-def]
    return find_moe_layers(harness.calibrated(name, gradients=True).op)


def random_plan(kept: BudgetPlan, tables: list[LayerTable], share: float, generator: np.random.Generator) -> BudgetPlan:
    """Experts in random order take random smaller forms until the plan is small enough."""
    rows = [[table.offers[0] for table in layer.experts] for layer in tables]
    allowed, places = share * kept.source_bytes, [(at, e) for at, layer in enumerate(rows) for e in range(len(layer))]
    serving = {(at, expert) for at, layer in enumerate(rows) for expert in range(len(layer)) if expert < 3}
    for at, expert in [places[index] for index in generator.permutation(len(places))] * 3:
        taken = sum(offer.bytes for layer in rows for offer in layer)
        if taken <= allowed:
            break
        smaller = [
            offer
            for offer in tables[at].experts[expert].offers
            if offer.bytes < rows[at][expert].bytes
            and (offer.action.kind is not ActionKind.REDIRECT or (at, offer.action.size) in serving)
            and ((at, expert) not in serving or offer.action.kind.is_stored)
        ]
        if smaller:
            rows[at][expert] = smaller[int(generator.integers(len(smaller)))]
    layers = []
    for layer, offers in zip(kept.layers, rows, strict=True):
        experts = [
            row.model_copy(
                update={
                    "action": offer.action.kind,
                    "size": offer.action.size,
                    "bytes": offer.bytes,
                    "distortion": offer.distortion,
                    "neurons": offer.neurons,
                }
            )
            for row, offer in zip(layer.experts, offers, strict=True)
        ]
        layers.append(layer.model_copy(update={"experts": tuple(experts)}))
    return kept.model_copy(
        update={
            "layers": tuple(layers),
            "bytes": sum(offer.bytes for layer in rows for offer in layer),
            "predicted": sum(offer.distortion for layer in rows for offer in layer),
        }
    )
