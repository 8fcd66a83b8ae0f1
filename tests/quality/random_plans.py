"""Plans that no solver made: to see whether predicted losses order measured ones over all sizes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

import moec
from moec.artifact.options import OutputDType
from moec.budget.actions import ActionKind, Offer
from moec.budget.measure import Distortion
from moec.budget.offers import TableSettings
from moec.budget.plan import BudgetPlan, ExpertPlan, LayerPlan
from moec.budget.tables import LayerTable, layer_table
from moec.experts import find_moe_layers
from tests.quality import harness

_STORED = (ActionKind.NARROW, ActionKind.FACTOR)
_SMALL = (ActionKind.CONSTANT, ActionKind.ZERO)
_SMALL_BELOW = 0.05
"""Share of an expert's bytes below which only a constant or nothing stays."""
_SHARES = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
_SPREAD = 0.3
"""How far an expert's share of bytes may lie from that of the plan; less near 0 and 1, so that the mean is kept."""

_REDIRECTED = 0.2
"""Largest share of the experts, among those that could, for which another one answers."""


@dataclass(frozen=True)
class Predictions:
    """For each plan its share of the bytes, and the predicted and the measured increase in nats per token."""

    shares: NDArray[np.float64]
    predicted: NDArray[np.float64]
    measured: NDArray[np.float64]

    @property
    def rank_correlation(self) -> float:
        """Spearman's, between predicted and measured."""
        return float(spearmanr(self.predicted, self.measured).statistic)


def predict_and_measure(name: str, plans: int = 20, seed: int = 0) -> Predictions:
    """Makes random plans for a byte-level fixture, spread over 10 to 90 % of the bytes, and measures each."""
    module = harness.calibrated(name, seed, gradients=True)
    calibration = module.calibration
    assert calibration is not None
    settings = TableSettings(
        frozenset({*_STORED, *_SMALL, ActionKind.REDIRECT}),
        16,
        _SHARES,
        4,
        Distortion.AUTO.resolved(gradients=True),
        OutputDType.FLOAT32,
    )
    layers = find_moe_layers(module.op)
    tables = [layer_table(layer, calibration, settings) for layer in layers]
    generator = np.random.default_rng(seed)
    found = []
    for target in np.linspace(0.1, 0.9, plans):
        plan = _plan([layer.name for layer in layers], tables, float(target), generator)
        changed = harness.calibrated(name, seed, gradients=True)
        changed.plan = plan
        moec.run_passes(changed, "apply-plan")
        found.append((plan.bytes / plan.source_bytes, plan.predicted, harness.measure(name, changed).increase))
    shares, predicted, measured = np.array(found).T
    return Predictions(shares, predicted, measured)


def _plan(names: list[str], tables: list[LayerTable], target: float, generator: np.random.Generator) -> BudgetPlan:
    layers = [
        LayerPlan(layer=name, experts=tuple(_layer(table, target, generator)))
        for name, table in zip(names, tables, strict=True)
    ]
    experts = [expert for layer in layers for expert in layer.experts]
    return BudgetPlan(
        measure=Distortion.AUTO.resolved(gradients=True).value,
        solver="chance",
        dtype=OutputDType.FLOAT32.value,
        budget_bytes=sum(expert.bytes for expert in experts),
        bytes=sum(expert.bytes for expert in experts),
        source_bytes=sum(table.source_bytes for table in tables),
        budget_flops=None,
        flops=0.0,
        source_flops=sum(table.source_flops for table in tables),
        predicted=sum(expert.distortion for expert in experts),
        bound=0.0,
        gap=0.0,
        layers=tuple(layers),
    )


def _layer(table: LayerTable, target: float, generator: np.random.Generator) -> list[ExpertPlan]:
    """An own action for every expert, by chance near the target; then some are redirected to ones that stay whole."""
    chosen: list[Offer] = []
    spread = min(_SPREAD, target, 1 - target)
    for expert in table.experts:
        share = target + spread * generator.uniform(-1, 1)
        whole = expert.offers[0]
        picked = (_SMALL if share < _SMALL_BELOW else _STORED)[generator.integers(2)]
        offers = [whole, *(offer for offer in expert.offers if offer.action.kind is picked)]
        chosen.append(min(offers, key=lambda offer: abs(offer.bytes / whole.bytes - share)))
    for number, expert in enumerate(table.experts):
        redirects = [
            offer
            for offer in expert.offers
            if offer.action.kind is ActionKind.REDIRECT and chosen[offer.action.size].action.kind is ActionKind.KEEP
        ]
        whole = chosen[number].action.kind is ActionKind.KEEP
        if redirects and not whole and generator.random() > max(target, 1 - _REDIRECTED):
            chosen[number] = redirects[generator.integers(len(redirects))]
    return [
        ExpertPlan(
            expert=expert.expert,
            action=offer.action.kind,
            size=offer.action.size,
            bytes=offer.bytes,
            distortion=offer.distortion,
            neurons=offer.neurons,
        )
        for expert, offer in zip(table.experts, chosen, strict=True)
    ]
