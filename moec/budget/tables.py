"""What can be done to each expert of a layer, with its bytes, its FLOPs and what it costs the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moec.artifact.options import OutputDType
from moec.budget.actions import Action, ActionKind, Offer
from moec.budget.measure import Distortion, ErrorMeasure
from moec.budget.shared_base import ranks_of, shared_base
from moec.calibration.calibration import Calibration
from moec.experts import Constant, Dense, Expert, FeedForward, LowRank, MoeLayer, load_expert
from moec.experts.bodies import operands_of
from moec.passes.factoring.decomposition import decompose, saves
from moec.passes.factoring.sides import Basis, Norms, Side, dense_matrix, projection, with_matrices
from moec.passes.neuron_pruning.slicing import slice_neurons, slicing_problem

DAMPING = 0.01
"""Share of the mean eigenvalue that is added to second moments before matrices are factored."""


@dataclass(frozen=True)
class TableSettings:
    """`actions` are offered besides `keep`; widths come in `steps`, ranks hold `shares` of a matrix's parameters, and
    redirects go to the `nearest` experts. `dtype` is that of the artifact."""

    actions: frozenset[ActionKind]
    steps: int
    shares: tuple[float, ...]
    nearest: int
    distortion: Distortion
    dtype: OutputDType


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
    used = sorted(set(layer.stored) - {-1})
    x = sample.x.float()
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
            rows, gates = sample.chosen(layer, number)
            inputs, priced = x[rows], measure.of_expert(rows)
            if isinstance(expert, FeedForward):
                offers += _narrowed(expert, rows, gates, inputs, priced, settings, share)
                offers += _factored(expert, number, rows, gates, inputs, priced, settings, share, norms)
                if base is not None and number in base.members:
                    thin = base.differences(expert, number, norms)
                    offers += _thinned(thin.at, ActionKind.DELTA, expert, rows, gates, inputs, priced, settings, share)
            offers += _vanished(expert, rows, gates, inputs, priced, settings)
            if redirects is not None:
                offers += _redirected(layer, number, redirects[number], settings.nearest)
        tables.append(ExpertTable(number, expert.width if isinstance(expert, FeedForward) else 0, tuple(offers)))
    base_bytes = 0 if base is None else base.elements * settings.dtype.itemsize
    return LayerTable(tuple(_with_redirect_work(table, statistics.count, full) for table in tables), base_bytes)


def stored_bytes(expert: Expert, dtype: OutputDType) -> int:
    """Bytes of an expert's tensors in the artifact; vectors stay float32 there. What its class shares is left out."""
    return sum(
        operand.tensor.numel() * (dtype.itemsize if operand.tensor.ndim > 1 else OutputDType.FLOAT32.itemsize)
        for operand in operands_of(expert)
        if not operand.shared
    )


def work(expert: Expert) -> float:
    """FLOPs of an expert on one token: two for each element of its matrices."""
    return 2.0 * sum(operand.tensor.numel() for operand in operands_of(expert) if operand.tensor.ndim > 1)


def constant_output(outputs: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """The vector [H] nearest to outputs [n, H] where gates [n] weigh the errors; zeros without rows."""
    weights = gates.double().square()
    return (weights @ outputs.double() / weights.sum().clamp_min(1e-300)).float()


def neuron_order(expert: FeedForward, gated: torch.Tensor, measure: ErrorMeasure) -> torch.Tensor:
    """Neurons by falling price of losing each alone, from gated activations [n, m]; int64 [m]."""
    energy = gated.double().square().sum(0) * measure.scaled_columns(expert.down.dense()).square().sum(0)
    return torch.sort(energy, descending=True, stable=True).indices


def factored(expert: FeedForward, number: int, rank: int, norms: Norms) -> FeedForward:
    """The expert with all dense matrices, where it saves anything, at one rank."""
    matrices = {}
    for side in Side:
        found = projection(expert, side)
        if found is not None and isinstance(found.matrix, Dense) and saves(rank, *found.matrix.shape):
            factors = decompose(dense_matrix(expert, side), norms.of(number, expert, side)).factors(rank)
            matrices[side] = LowRank(factors.left.float(), factors.right.float())
    return with_matrices(expert, matrices)


def _narrowed(
    expert: FeedForward,
    rows: torch.Tensor,
    gates: torch.Tensor,
    inputs: torch.Tensor,
    measure: ErrorMeasure,
    settings: TableSettings,
    share: float,
) -> list[Offer]:
    if ActionKind.NARROW not in settings.actions or slicing_problem(expert):
        return []
    gated = expert.hidden_activations(inputs).double() * gates[:, None]
    order = neuron_order(expert, gated, measure)
    prices = measure.tail_prices(rows, gated[:, order], expert.down.dense()[:, order])
    offers = []
    for width in sorted({expert.width * step // settings.steps for step in range(1, settings.steps)} - {0}):
        kept = torch.sort(order[:width]).values
        small = slice_neurons(expert, kept)
        size = stored_bytes(small, settings.dtype)
        action = Action(ActionKind.NARROW, width)
        offers.append(Offer(action, size, share * work(small), float(prices[width]), tuple(kept.tolist())))
    return offers


def _factored(
    expert: FeedForward,
    number: int,
    rows: torch.Tensor,
    gates: torch.Tensor,
    inputs: torch.Tensor,
    measure: ErrorMeasure,
    settings: TableSettings,
    share: float,
    norms: Norms,
) -> list[Offer]:
    sides = [found for side in Side if (found := projection(expert, side)) is not None]
    if ActionKind.FACTOR not in settings.actions or not all(isinstance(found.matrix, Dense) for found in sides):
        return []
    return _thinned(
        lambda rank: factored(expert, number, rank, norms),
        ActionKind.FACTOR,
        expert,
        rows,
        gates,
        inputs,
        measure,
        settings,
        share,
    )


def _thinned(
    at: Callable[[int], FeedForward],
    kind: ActionKind,
    expert: FeedForward,
    rows: torch.Tensor,
    gates: torch.Tensor,
    inputs: torch.Tensor,
    measure: ErrorMeasure,
    settings: TableSettings,
    share: float,
) -> list[Offer]:
    outputs = expert.apply(inputs)
    offers = []
    for rank in ranks_of(settings.shares, expert.up.matrix.shape):
        thin = at(rank)
        price = measure.price(rows, (thin.apply(inputs) - outputs) * gates[:, None])
        offers.append(Offer(Action(kind, rank), stored_bytes(thin, settings.dtype), share * work(thin), price))
    return offers


def _vanished(
    expert: Expert,
    rows: torch.Tensor,
    gates: torch.Tensor,
    inputs: torch.Tensor,
    measure: ErrorMeasure,
    settings: TableSettings,
) -> list[Offer]:
    outputs = expert.apply(inputs)
    offers = []
    if ActionKind.CONSTANT in settings.actions and not isinstance(expert, Constant):
        value = constant_output(outputs, gates)
        price = measure.price(rows, (outputs - value) * gates[:, None])
        size = stored_bytes(Constant(value), settings.dtype)
        offers.append(Offer(Action(ActionKind.CONSTANT), size, 0.0, price))
    if ActionKind.ZERO in settings.actions:
        offers.append(Offer(Action(ActionKind.ZERO), 0, 0.0, measure.price(rows, outputs * gates[:, None])))
    return offers


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
