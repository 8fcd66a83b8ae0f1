"""What can be done to each expert of a layer, with its bytes, its FLOPs and what it costs the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moec.budget.actions import Action, ActionKind, Offer
from moec.budget.coding import Coder, coded_inputs
from moec.budget.measure import ErrorMeasure
from moec.budget.offers import ExpertRows, TableSettings, offers_of, priced, stored_bytes, work
from moec.budget.ridge import refit_ridge
from moec.budget.shared_base import shared_base
from moec.calibration.calibration import Calibration
from moec.calibration.sample import LayerSample
from moec.experts import Expert, FeedForward, MoeLayer, load_expert
from moec.passes.factoring.sides import Basis, Norms

DAMPING = 0.01
"""Share of the mean eigenvalue that is added to second moments before matrices are factored."""


@dataclass(frozen=True)
class ExpertTable:
    """The offers of one stored expert, `keep` first. `width` is 0 for one without hidden activations."""

    expert: int
    width: int
    offers: tuple[Offer, ...]


@dataclass(frozen=True)
class LayerTable:
    """The tables of all stored experts of a layer; `base_bytes` are those of the mean that `delta` experts share."""

    experts: tuple[ExpertTable, ...]
    base_bytes: int

    @property
    def source_bytes(self) -> int:
        """Bytes of experts that all stay as they are."""
        return sum(table.offers[0].bytes for table in self.experts)

    @property
    def source_flops(self) -> float:
        """FLOPs of experts that all stay as they are."""
        return sum(table.offers[0].flops for table in self.experts)


def layer_table(layer: MoeLayer, calibration: Calibration, settings: TableSettings) -> LayerTable:
    """The table of a layer. Raises UnreadableExpertError where an expert cannot be read."""
    sample, statistics = calibration.sample(layer), calibration.statistics(layer)
    measure = ErrorMeasure.of(settings.distortion, layer, sample, statistics)
    norms = Norms(layer, sample, Basis.GATE_WHITENED, DAMPING)
    ridge = refit_ridge(layer, sample, statistics) if settings.refit else 0.0
    used = sorted(set(layer.stored) - {-1})
    redirects = _redirect_prices(layer, calibration, measure) if ActionKind.REDIRECT in settings.actions else None
    base = shared_base(layer, sample.weights, statistics.count) if ActionKind.DELTA in settings.actions else None
    tables = []
    full: dict[int, float] = {}
    for number in range(layer.expert_count):
        expert = load_expert(layer, sample.weights, number)
        share = float(statistics.count[number]) / max(statistics.tokens, 1)
        offers = [Offer(Action(ActionKind.KEEP), stored_bytes(expert, settings.dtype), share * work(expert), 0.0)]
        full[number] = share * work(expert)
        if number in used and number not in layer.protected:
            seen = _rows_of(layer, sample, number, expert, measure, settings)
            offers += offers_of(expert, replace(seen, frequency=share, ridge=ridge), settings, norms, base)
            if redirects is not None:
                offers += _redirected(layer, number, redirects[number], settings.nearest)
        tables.append(ExpertTable(number, expert.width if isinstance(expert, FeedForward) else 0, tuple(offers)))
    base_bytes = 0 if base is None else base.elements * settings.dtype.itemsize
    return LayerTable(tuple(_with_redirect_work(table, statistics.count, full) for table in tables), base_bytes)


def priced_offers(
    layer: MoeLayer, calibration: Calibration, settings: TableSettings, wanted: Mapping[int, Sequence[Offer]]
) -> dict[int, list[Offer]]:
    """Offers of codes for experts by their numbers, at the prices that the codes have when they are made."""
    sample = calibration.sample(layer)
    measure = ErrorMeasure.of(settings.distortion, layer, sample, calibration.statistics(layer))
    found = {}
    for number, offers in wanted.items():
        expert = load_expert(layer, sample.weights, number)
        assert isinstance(expert, FeedForward)
        found[number] = priced(expert, offers, _rows_of(layer, sample, number, expert, measure, settings))
    return found


def _rows_of(
    layer: MoeLayer, sample: LayerSample, number: int, expert: Expert, measure: ErrorMeasure, settings: TableSettings
) -> ExpertRows:
    rows, gates = sample.chosen(layer, number)
    coder = None
    if settings.bits and isinstance(expert, FeedForward):
        coder = Coder.of(expert, coded_inputs(layer, sample), number, settings.group, refit=settings.refit)
    return ExpertRows(number, rows, gates, sample.x[rows].float(), measure.of_expert(rows), coder=coder)


def _redirected(layer: MoeLayer, number: int, prices: torch.Tensor, nearest: int) -> list[Offer]:
    """To the nearest experts that are neither protected nor unused: a protected one keeps its own tokens only."""
    targets = [other for other in sorted(set(layer.stored) - {-1, number}) if other not in layer.protected]
    targets.sort(key=lambda other: (float(prices[other]), other))
    return [Offer(Action(ActionKind.REDIRECT, other), 0, 0.0, float(prices[other])) for other in targets[:nearest]]


def _with_redirect_work(table: ExpertTable, count: torch.Tensor, full: dict[int, float]) -> ExpertTable:
    """A redirect costs what its target costs for the tokens of this expert, as if that stayed as it is."""
    offers: list[Offer] = []
    for offer in table.offers:
        if offer.action.kind is ActionKind.REDIRECT:
            target = offer.action.size
            each = full[target] / max(float(count[target]), 1.0)
            offer = Offer(offer.action, 0, each * float(count[table.expert]), offer.distortion)
        offers.append(offer)
    return ExpertTable(table.expert, table.width, tuple(offers))


def _redirect_prices(layer: MoeLayer, calibration: Calibration, measure: ErrorMeasure) -> torch.Tensor:
    """[E, E]: the price of letting column d answer for row e."""
    if measure.gradient is None:
        return calibration.redirect_distortion(layer) * (measure.factor / measure.rows)
    sample = calibration.sample(layer)
    x, count = sample.x.float(), layer.expert_count
    chosen = [sample.chosen(layer, number) for number in range(count)]
    measures = [measure.of_expert(rows) for rows, _ in chosen]
    own = [load_expert(layer, sample.weights, number).apply(x[chosen[number][0]]) for number in range(count)]
    result = torch.zeros(count, count, dtype=torch.float64)
    for other in range(count):
        outputs = load_expert(layer, sample.weights, other).apply(x)
        for number, (rows, gates) in enumerate(chosen):
            if number != other:
                result[number, other] = measures[number].price(rows, (outputs[rows] - own[number]) * gates[:, None])
    return result
