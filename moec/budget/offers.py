"""The ways to make one expert smaller, each with its bytes, its FLOPs and what it costs the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isfinite

import torch

from moec.budget.actions import Action, ActionKind, Offer
from moec.budget.coding import Coder
from moec.budget.elimination import eliminate
from moec.budget.estimates import CodedExpert
from moec.budget.local_fit import left_by_fit
from moec.budget.measure import Distortion, ErrorMeasure
from moec.budget.shared_base import SharedBase, ranks_of
from moec.experts import Constant, Dense, Expert, FeedForward, LowRank, Projection, Quantized
from moec.experts.bodies import operands_of
from moec.passes.factoring.decomposition import decompose, saves
from moec.passes.factoring.sides import (
    Norms,
    Side,
    dense_matrix,
    has_dense_matrices,
    parameters,
    projection,
    with_matrices,
)
from moec.passes.merging.layer_fit import fitted_features
from moec.passes.neuron_pruning.slicing import slice_neurons, slicing_problem
from moec.weights.output_type import OutputDType

_CODED_WIDTHS = 8
"""Narrowed experts come as codes, too, if their width is a whole number of such parts."""


@dataclass(frozen=True)
class TableSettings:
    """`actions` are offered besides `keep`; widths come in `steps`, ranks hold `shares` of a matrix's parameters, and
    redirects go to the `nearest` experts. `dtype` is that of the artifact; codes of so many `bits` have scales for
    `group` inputs. With `refit` neurons are chosen, and they and ranks are priced, as if `refit-down` came afterwards.
    """

    actions: frozenset[ActionKind]
    steps: int
    shares: tuple[float, ...]
    nearest: int
    distortion: Distortion
    dtype: OutputDType
    refit: bool = False
    bits: tuple[int, ...] = ()
    group: int = 32


@dataclass(frozen=True)
class ExpertRows:
    """The expert `number` on the rows int64 [n] of the sample that chose it: its `gates` float64 [n], `inputs` [n, H]
    and what its errors cost. The share `frequency` of all tokens chose it; `ridge` is the weight of the change of its
    last product in a refit; `coder` makes codes of it where they are offered."""

    number: int
    rows: torch.Tensor
    gates: torch.Tensor
    inputs: torch.Tensor
    measure: ErrorMeasure
    frequency: float = 0.0
    ridge: float = 0.0
    coder: Coder | None = None

    def price(self, errors: torch.Tensor) -> float:
        """The price of errors [n, H] of the expert's output."""
        return self.measure.price(self.rows, errors * self.gates[:, None])


def offers_of(
    expert: Expert, seen: ExpertRows, settings: TableSettings, norms: Norms, base: SharedBase | None
) -> list[Offer]:
    """All that is offered for an expert besides keeping it and redirects."""
    offers: list[Offer] = []
    if isinstance(expert, FeedForward):
        narrowed = _narrowed(expert, seen, settings)
        offers += narrowed
        offers += _coded(expert, narrowed, seen, settings)
        offers += _factored(expert, seen, settings, norms)
        if base is not None and seen.number in base.members:
            offers += _thinned(
                base.differences(expert, seen.number, norms).at, ActionKind.DELTA, expert, seen, settings
            )
    return offers + _vanished(expert, seen, settings)


def stored_bytes(expert: Expert, dtype: OutputDType) -> int:
    """Bytes of an expert's tensors in the artifact, without what its class shares.

    Vectors and the parts of packed matrices keep their types there.
    """
    return sum(
        operand.tensor.numel()
        * (dtype.itemsize if operand.tensor.ndim > 1 and not operand.packed else operand.itemsize)
        for operand in operands_of(expert)
        if not operand.shared
    )


def work(expert: Expert) -> float:
    """FLOPs of an expert on one token: two for each element of its matrices, packed ones included."""
    numbers = 2.0 * sum(
        operand.tensor.numel() for operand in operands_of(expert) if operand.tensor.ndim > 1 and not operand.packed
    )
    sides = [item.matrix.shape for side in Side if (item := _packed_side(expert, side)) is not None]
    return numbers + 2.0 * sum(outputs * inputs for outputs, inputs in sides)


def _packed_side(expert: Expert, side: Side) -> Projection | None:
    found = projection(expert, side) if isinstance(expert, FeedForward) else None
    return found if found is not None and isinstance(found.matrix, Quantized) else None


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


def _narrowed(expert: FeedForward, seen: ExpertRows, settings: TableSettings) -> list[Offer]:
    if ActionKind.NARROW not in settings.actions or slicing_problem(expert):
        return []
    gated = expert.hidden_activations(seen.inputs).double() * seen.gates[:, None]
    widths = sorted({expert.width * step // settings.steps for step in range(1, settings.steps)} - {0})
    offers = []
    for kept, price in _kept_neurons(expert, seen, gated, widths, refit=settings.refit):
        action = Action(ActionKind.NARROW, len(kept))
        offers.append(_offer(action, slice_neurons(expert, kept), seen, settings, price, tuple(kept.tolist())))
    return offers


def _coded(expert: FeedForward, narrowed: Sequence[Offer], seen: ExpertRows, settings: TableSettings) -> list[Offer]:
    """Codes of all numbers of bits for all neurons, and for those that some narrowed ones keep, at estimated prices.

    The last matrix has as many bits as the others, or the next number: what they lose it makes up for in part, but
    nothing makes up for what it loses.
    """
    if ActionKind.QUANTIZE not in settings.actions or seen.coder is None or not has_dense_matrices(expert):
        return []
    part = expert.width // min(_CODED_WIDTHS, expert.width)
    starts = [Offer(Action(ActionKind.QUANTIZE), 0, 0.0, 0.0)]
    starts += [offer for offer in narrowed if offer.action.size % part == 0]
    everything = tuple(range(expert.width))
    kept = [torch.tensor(offer.neurons or everything) for offer in starts]
    numbers = sorted(settings.bits)
    pairs = [*zip(numbers, numbers, strict=True), *pairwise(numbers)]
    measure = seen.measure.as_norm(seen.rows)
    coded = CodedExpert(expert, seen.inputs, seen.gates, measure, seen.coder)
    offers = []
    for start, found in zip(starts, coded.estimates(kept, pairs), strict=True):
        smaller = slice_neurons(expert, torch.tensor(start.neurons)) if start.neurons else expert
        vectors = stored_bytes(smaller, settings.dtype) - settings.dtype.itemsize * parameters(smaller)
        flops = seen.frequency * work(smaller)
        for (bits, down_bits), price in found.items():
            action = replace(start.action, bits=bits, down_bits=down_bits)
            size = vectors + seen.coder.stored_bytes(smaller, bits, down_bits)
            if isfinite(price.sure + price.codes):
                offers.append(Offer(action, size, flops, price.sure + price.codes, start.neurons, price.sure))
    return offers


def priced(expert: FeedForward, offers: Sequence[Offer], seen: ExpertRows) -> list[Offer]:
    """Offers of codes at the prices that codes have when they are made."""
    outputs = expert.apply(seen.inputs)
    found = []
    for offer in offers:
        assert seen.coder is not None
        packed = seen.coder.coded(offer.neurons, offer.action.bits, offer.action.down_bits)
        found.append(replace(offer, distortion=seen.price(packed.apply(seen.inputs) - outputs), sure=None))
    return found


def _kept_neurons(
    expert: FeedForward, seen: ExpertRows, gated: torch.Tensor, widths: list[int], *, refit: bool
) -> list[tuple[torch.Tensor, float]]:
    """(the neurons that stay, ascending; the price) for each width, from gated activations [n, m]."""
    measure, columns = seen.measure, expert.down.dense()
    if refit:
        found = eliminate(gated, measure.scaled_columns(columns), widths, seen.ridge)
        return [(item.kept, measure.of_energy(item.energy)) for item in found]
    order = neuron_order(expert, gated, measure)
    prices = measure.tail_prices(seen.rows, gated[:, order], columns[:, order])
    return [(torch.sort(order[:width]).values, float(prices[width])) for width in widths]


def _factored(expert: FeedForward, seen: ExpertRows, settings: TableSettings, norms: Norms) -> list[Offer]:
    sides = [found for side in Side if (found := projection(expert, side)) is not None]
    if ActionKind.FACTOR not in settings.actions or not all(isinstance(found.matrix, Dense) for found in sides):
        return []
    return _thinned(lambda rank: factored(expert, seen.number, rank, norms), ActionKind.FACTOR, expert, seen, settings)


def _thinned(
    at: Callable[[int], FeedForward],
    kind: ActionKind,
    expert: FeedForward,
    seen: ExpertRows,
    settings: TableSettings,
) -> list[Offer]:
    outputs = expert.apply(seen.inputs)
    offers = []
    for rank in ranks_of(settings.shares, expert.up.matrix.shape):
        thin = at(rank)
        hidden = thin.hidden_activations(seen.inputs)
        errors = thin.down.apply(hidden) - outputs
        features = fitted_features(thin, hidden) if settings.refit else None
        if features is not None:
            errors = left_by_fit(features, errors, seen.gates, seen.ridge)
        offers.append(_offer(Action(kind, rank), thin, seen, settings, seen.price(errors)))
    return offers


def _vanished(expert: Expert, seen: ExpertRows, settings: TableSettings) -> list[Offer]:
    outputs = expert.apply(seen.inputs)
    offers = []
    if ActionKind.CONSTANT in settings.actions and not isinstance(expert, Constant):
        value = constant_output(outputs, seen.gates)
        price = seen.price(outputs - value)
        offers.append(_offer(Action(ActionKind.CONSTANT), Constant(value), seen, settings, price))
    if ActionKind.ZERO in settings.actions:
        offers.append(Offer(Action(ActionKind.ZERO), 0, 0.0, seen.price(outputs)))
    return offers


def _offer(
    action: Action,
    smaller: Expert,
    seen: ExpertRows,
    settings: TableSettings,
    price: float,
    neurons: tuple[int, ...] = (),
) -> Offer:
    return Offer(action, stored_bytes(smaller, settings.dtype), seen.frequency * work(smaller), price, neurons)
