"""From what calibration knows of the layers to the groups of experts of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moec.calibration.calibration import Calibration
from moec.calibration.statistics import LayerStatistics
from moec.experts import MoeLayer, load_expert
from moec.passes.merging.alignment import align, weight_profit
from moec.passes.merging.choices import (
    Alignment,
    Grouping,
    Selection,
    Weighting,
    experts_to_keep,
    global_choice,
    require_room,
)
from moec.passes.merging.facility import FacilityTable, solve_facility
from moec.passes.merging.grouping import (
    Matrix,
    average_linkage,
    co_activation_distance,
    cosine,
    join_nearest,
    random_groups,
    router_cosine,
    spectral_groups,
    strongest_of,
)
from moec.passes.merging.neurons import NeuronTable
from moec.weights.context import WeightContext


@dataclass(frozen=True)
class GroupingRequest:
    """What is wanted of a grouping. `averages` says that members of a group are averaged, so that protected experts
    stay alone; `keeps_rows` that only the router outputs of centres stay. `seed` is that of random groups."""

    keep: float
    grouping: Grouping
    select: Selection
    alignment: Alignment
    weighting: Weighting
    averages: bool
    keeps_rows: bool
    time_limit: float
    seed: int


@dataclass(frozen=True)
class GroupedLayer:
    """The centre of each stored expert of a layer, and how important the experts are."""

    layer: MoeLayer
    centres: tuple[int, ...]
    importance: tuple[float, ...]

    @property
    def groups(self) -> dict[int, tuple[int, ...]]:
        """The members of the group of each centre, ascending."""
        return {
            centre: tuple(expert for expert, own in enumerate(self.centres) if own == centre)
            for centre in sorted(set(self.centres))
        }


@dataclass(frozen=True)
class GroupingPlan:
    """Groups of all layers; `gap` of the facility location to its bound, None where nothing was solved."""

    layers: tuple[GroupedLayer, ...]
    gap: float | None = None


def plan_groups(
    layers: Sequence[MoeLayer], calibration: Calibration, weights: WeightContext, request: GroupingRequest
) -> GroupingPlan:
    """The groups of all layers as they are now.

    Raises UsageError for a number of experts that a layer cannot keep, UnmergeableExpertError where groups are by
    weights and an expert has none that can be compared.
    """
    if not layers:
        return GroupingPlan(())
    statistics = [calibration.statistics(layer) for layer in layers]
    importance = [tuple(request.weighting.importance(found)) for found in statistics]
    minimum = [layer.top_k if request.keeps_rows else 1 for layer in layers]
    counts = [experts_to_keep(request.keep, layer.expert_count) for layer in layers]
    for layer, count, least in zip(layers, counts, minimum, strict=True):
        alone = len(layer.protected) if request.averages else 0
        require_room(layer.name, count, layer.expert_count, least, alone, len(layer.protected))
    minimum = [
        min(max(least, len(layer.protected) + (request.averages and len(layer.protected) < layer.expert_count)), count)
        for layer, least, count in zip(layers, minimum, counts, strict=True)
    ]
    if request.grouping is Grouping.FACILITY:
        return _facility(layers, statistics, importance, calibration, request, counts, minimum)
    required = [layer.protected for layer in layers]
    if request.select is Selection.GLOBAL:
        chosen = global_choice(importance, sum(counts), required, minimum)
    else:
        chosen = [
            strongest_of(values, count, kept) for values, count, kept in zip(importance, counts, required, strict=True)
        ]
    grouped = []
    for layer, found, values, centres in zip(layers, statistics, importance, chosen, strict=True):
        closed = layer.protected if request.averages else frozenset()
        open_centres = [centre for centre in centres if centre not in closed]
        if request.grouping in (Grouping.ROUTER_COSINE, Grouping.WEIGHT):
            similarity = _similarity(layer, found, values, weights, request)
            groups = join_nearest(similarity, centres, open_centres)
        else:
            groups = _clusters(layer, found, values, calibration, request, len(centres), layer.protected)
        grouped.append(GroupedLayer(layer, groups, values))
    return GroupingPlan(tuple(grouped))


def _similarity(
    layer: MoeLayer,
    statistics: LayerStatistics,
    importance: Sequence[float],
    weights: WeightContext,
    request: GroupingRequest,
) -> Matrix:
    if request.grouping is Grouping.ROUTER_COSINE:
        return _router_cosine(layer, statistics)
    reference = min(range(layer.expert_count), key=lambda expert: (-importance[expert], expert))
    first = NeuronTable.of(load_expert(layer, weights, reference))
    tables = []
    for expert in range(layer.expert_count):
        table = NeuronTable.of(load_expert(layer, weights, expert))
        if request.alignment is not Alignment.NONE and table.kind == first.kind:
            # one common order instead of one for each pair: E assignments instead of E^2
            table = table.take(align(weight_profit(first, table)))
        tables.append(table)
    kinds = [table.kind for table in tables]
    similarity = np.full((len(tables), len(tables)), -2.0)
    for kind in dict.fromkeys(kinds):
        alike = [expert for expert, own in enumerate(kinds) if own == kind]
        rows = torch.stack([tables[expert].rows().flatten() for expert in alike]).double()
        similarity[np.ix_(alike, alike)] = cosine((rows @ rows.T).numpy())
    return similarity


def _clusters(
    layer: MoeLayer,
    statistics: LayerStatistics,
    importance: Sequence[float],
    calibration: Calibration,
    request: GroupingRequest,
    count: int,
    alone: frozenset[int],
) -> tuple[int, ...]:
    """Groups of all experts but protected ones, which stay alone."""
    free = [expert for expert in range(layer.expert_count) if expert not in alone]
    picked = np.ix_(free, free)
    values = [importance[expert] for expert in free]
    count = min(count - len(alone), len(free))
    if not free:
        return tuple(range(layer.expert_count))
    if request.grouping is Grouping.SPECTRAL:
        groups = spectral_groups(_router_cosine(layer, statistics)[picked], count, values)
    elif request.grouping is Grouping.RANDOM:
        groups = random_groups(count, values, np.random.default_rng([request.seed, layer.index]))
    else:
        if request.grouping is Grouping.MEAN_OUTPUT:
            means = calibration.mean_outputs(layer)
            distance = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist").numpy()
        else:
            distance = co_activation_distance(statistics.coactivation.numpy())
        groups = average_linkage(distance[picked], count, values)
    result = list(range(layer.expert_count))
    for expert, centre in zip(free, groups, strict=True):
        result[expert] = free[centre]
    return tuple(result)


def _router_cosine(layer: MoeLayer, statistics: LayerStatistics) -> Matrix:
    outputs = [layer.outputs_of(expert) for expert in range(layer.expert_count)]
    return router_cosine(statistics.logit_gram.numpy(), outputs)


def _facility(
    layers: Sequence[MoeLayer],
    statistics: Sequence[LayerStatistics],
    importance: Sequence[tuple[float, ...]],
    calibration: Calibration,
    request: GroupingRequest,
    counts: Sequence[int],
    minimum: Sequence[int],
) -> GroupingPlan:
    energies = [found.layer_gradient_energy for found in statistics]
    tables = []
    for layer, energy, least in zip(layers, energies, minimum, strict=True):
        distortion = calibration.redirect_distortion(layer).numpy()
        if request.select is Selection.GLOBAL and energy is not None and None not in energies:
            distortion = distortion * energy
        alone = layer.protected if request.averages else frozenset()
        tables.append(FacilityTable(distortion, layer.protected, alone, least))
    if request.select is Selection.GLOBAL:
        plans = [solve_facility(tables, sum(counts), request.time_limit)]
    else:
        plans = [
            solve_facility([table], count, request.time_limit) for table, count in zip(tables, counts, strict=True)
        ]
    groupings = [grouping for plan in plans for grouping in plan.groupings]
    grouped = tuple(GroupedLayer(*item) for item in zip(layers, groupings, importance, strict=True))
    return GroupingPlan(grouped, max(plan.gap for plan in plans))
