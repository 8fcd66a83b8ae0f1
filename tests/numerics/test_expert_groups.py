"""Balanced groups of experts against brute force, and the gate mass that they lose against the route itself."""

from __future__ import annotations

import itertools

import pytest
import torch

from moec.dialects.moe import Routing, Select
from moec.passes.expert_groups.partition import (
    balanced_partition,
    gate_table,
    groups_of,
    lost_gate_mass,
    lost_if_grouped_together,
    random_assignment,
)
from moec.reference.route import RouteInputs, route


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def affinities(count: int) -> torch.Tensor:
    values = torch.rand(count, count, dtype=torch.float64).square()
    return (values + values.T).fill_diagonal_(0.0)


def inside(affinity: torch.Tensor, groups: tuple[tuple[int, ...], ...]) -> float:
    return sum(float(affinity[list(members)][:, list(members)].sum()) for members in groups)


@pytest.mark.parametrize("seed", range(5))
def test_partition_is_near_the_best_of_all(seed: int) -> None:
    torch.manual_seed(seed)
    affinity = affinities(8)
    best = min(
        inside(affinity, (first, tuple(set(range(8)) - set(first)))) for first in itertools.combinations(range(8), 4)
    )
    found = balanced_partition(affinity, 2, generator())
    assert sorted(itertools.chain(*found)) == list(range(8)) and {len(members) for members in found} == {4}
    assert inside(affinity, found) == pytest.approx(best)


def test_partition_separates_pairs_that_are_chosen_together() -> None:
    affinity = torch.zeros(12, 12, dtype=torch.float64)
    for pair in range(6):
        affinity[2 * pair, 2 * pair + 1] = affinity[2 * pair + 1, 2 * pair] = 1.0
    found = balanced_partition(affinity, 3, generator())
    assert inside(affinity, found) == 0.0


def test_partition_ends_where_nothing_differs() -> None:
    assert len(balanced_partition(torch.zeros(6, 6, dtype=torch.float64), 3, generator())) == 3


def test_one_group_loses_nothing() -> None:
    ids, gates, _ = route(RouteInputs(torch.randn(50, 8)), Routing(k=4))
    assert lost_gate_mass(ids, gates, (tuple(range(8)),), 4) == 0.0


@pytest.mark.parametrize(("groups", "k"), [(2, 2), (4, 4), (2, 4), (4, 8)])
def test_lost_mass_is_that_of_choices_which_the_grouped_route_does_not_make(groups: int, k: int) -> None:
    logits = torch.randn(200, 16, dtype=torch.float64)
    ids, gates, _ = route(RouteInputs(logits), Routing(k=k))
    partition = groups_of(random_assignment(16, groups, generator()), groups)
    order = torch.tensor([expert for members in partition for expert in members])
    grouped = Routing(k=k, select=Select.PER_GROUP_TOPK, groups=groups)
    grouped_ids, grouped_gates, count = route(RouteInputs(logits[:, order]), grouped)
    assert bool((count == k).all())
    before = gate_table(ids, gates, 16)
    after = gate_table(order[grouped_ids], grouped_gates, 16)
    lost = before[(before > 0) & (after == 0)].sum() / before.sum()
    assert lost_gate_mass(ids, gates, partition, k // groups) == pytest.approx(float(lost))


def test_what_two_experts_lose_is_the_lost_mass_of_pairs() -> None:
    ids, gates, _ = route(RouteInputs(torch.randn(300, 6, dtype=torch.float64)), Routing(k=2))
    affinity = lost_if_grouped_together(ids, gates, 6)
    torch.testing.assert_close(affinity, affinity.T)
    partition = ((0, 1, 2), (3, 4, 5))
    expected = inside(affinity, partition) / 2 / float(gates.sum())
    assert lost_gate_mass(ids, gates, partition, 1) == pytest.approx(expected)
