"""Groupings of experts on matrices."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage

from moec.passes.merging import (
    FacilityTable,
    average_linkage,
    co_activation_distance,
    cosine,
    join_nearest,
    random_groups,
    router_cosine,
    solve_facility,
    spectral_groups,
    strongest_of,
)


def distances(seed: int, size: int) -> np.ndarray:
    points = np.random.default_rng(seed).normal(size=(size, 3))
    return np.linalg.norm(points[:, None] - points[None], axis=2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 3, 7, 12])
def test_average_linkage_is_scipys(seed: int, count: int) -> None:
    distance = distances(seed, 12)
    grouping = average_linkage(distance, count, [1.0] * 12)
    upper = distance[np.triu_indices(12, 1)]
    labels = fcluster(linkage(upper, method="average"), count, criterion="maxclust")
    assert len(set(grouping)) == count
    assert {(a, b) for a, b in combinations(range(12), 2) if grouping[a] == grouping[b]} == {
        (a, b) for a, b in combinations(range(12), 2) if labels[a] == labels[b]
    }


def test_the_centre_of_a_group_is_its_most_important_member() -> None:
    distance = np.array([[0, 1, 9, 9], [1, 0, 9, 9], [9, 9, 0, 1], [9, 9, 1, 0]], dtype=float)
    assert average_linkage(distance, 2, [1, 2, 5, 5]) == (1, 1, 2, 2)


@pytest.mark.parametrize("group", [average_linkage, spectral_groups])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_equal_experts_still_give_the_number_of_groups(group: Callable[..., tuple[int, ...]], count: int) -> None:
    matrix = np.zeros((5, 5)) if group is average_linkage else np.ones((5, 5))
    assert len(set(group(matrix, count, [1.0] * 5))) == count


def test_spectral_groups_are_blocks() -> None:
    blocks = np.array([0, 1, 2, 0, 1, 2, 0, 0])
    affinity = np.where(blocks[:, None] == blocks[None], 0.9, 0.05)
    assert spectral_groups(affinity, 3, [1, 1, 1, 2, 1, 2, 1, 1]) == (3, 1, 5, 3, 1, 5, 3, 3)


def test_random_groups_are_of_equal_size_and_follow_the_generator() -> None:
    importance = [1.0, 5.0, 2.0, 5.0, 3.0, 4.0, 0.0]
    found = {seed: random_groups(3, importance, np.random.default_rng(seed)) for seed in (0, 1)}
    assert found[0] == random_groups(3, importance, np.random.default_rng(0)) != found[1]
    for groups in found.values():
        assert sorted(groups.count(centre) for centre in set(groups)) == [2, 2, 3]
        for expert, centre in enumerate(groups):
            assert groups[centre] == centre and importance[centre] >= importance[expert]


def test_router_cosine_is_that_of_the_columns_of_the_logits() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 5))
    # expert 1 has the outputs 1 and 3, output 4 leads nowhere
    similarity = router_cosine(logits.T @ logits, [[0], [1, 3], [2]])
    columns = [logits[:, 0], logits[:, 1] + logits[:, 3], logits[:, 2]]
    for a, b in combinations(range(3), 2):
        expected = columns[a] @ columns[b] / np.linalg.norm(columns[a]) / np.linalg.norm(columns[b])
        assert similarity[a, b] == pytest.approx((expected + 1) / 2)


def test_cosine_of_nothing_is_zero() -> None:
    assert cosine(np.diag([4.0, 0.0])).tolist() == [[1, 0], [0, 1]]
    assert co_activation_distance(np.array([[4.0, 4.0], [4.0, 4.0]])).tolist() == [[0, 0], [0, 0]]


def test_the_strongest_stay_with_ties_to_the_lower_index() -> None:
    assert strongest_of([1, 5, 5, 5], 2) == (1, 2)
    assert strongest_of([1, 5, 5, 5], 2, required=[0]) == (0, 1)


def test_nearest_centre_with_ties_to_the_lower_index() -> None:
    similarity = np.array([[1, 0, 0.5, 0.5], [0, 1, 0, 0.2], [0.5, 0, 1, 0], [0.5, 0.2, 0, 1]])
    assert join_nearest(similarity, [2, 3], [2, 3]) == (2, 3, 2, 3)
    assert join_nearest(similarity, [2, 3], [3]) == (3, 3, 2, 3)


def brute_force(table: FacilityTable, count: int) -> float:
    experts = range(len(table.distortion))
    fixed = table.required | table.alone
    costs = [
        table.cost(table.join(centres))
        for centres in combinations(experts, count)
        if fixed <= set(centres) and (set(centres) - table.alone or count == len(experts))
    ]
    return min(costs)


def facility_table(seed: int, size: int, **limits: frozenset[int]) -> FacilityTable:
    distortion = np.random.default_rng(seed).exponential(size=(size, size))
    np.fill_diagonal(distortion, 0.0)
    return FacilityTable(distortion, **limits)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 2, 4, 7, 8])
def test_facility_location_is_brute_force(seed: int, count: int) -> None:
    table = facility_table(seed, 8)
    plan = solve_facility([table], count, 30)
    assert len(set(plan.groupings[0])) == count
    assert plan.cost == pytest.approx(brute_force(table, count), rel=1e-6)
    assert plan.gap < 1e-6 and plan.bound <= plan.cost


@pytest.mark.parametrize("seed", range(3))
def test_facility_location_with_experts_that_stay(seed: int) -> None:
    table = facility_table(seed, 6, required=frozenset({5}), alone=frozenset({1}))
    plan = solve_facility([table], 3, 30)
    assert plan.cost == pytest.approx(brute_force(table, 3), rel=1e-6)
    (grouping,) = plan.groupings
    assert grouping[5] == 5
    assert [expert for expert, centre in enumerate(grouping) if centre == 1] == [1]


def test_layers_share_what_stays() -> None:
    tables = [facility_table(seed, 5) for seed in range(2)]
    plan = solve_facility(tables, 5, 30)
    counts = [len(set(grouping)) for grouping in plan.groupings]
    assert sum(counts) == 5
    best = min(brute_force(tables[0], first) + brute_force(tables[1], 5 - first) for first in range(1, 5))
    assert plan.cost == pytest.approx(best, rel=1e-6)


def test_a_layer_keeps_its_minimum() -> None:
    free = FacilityTable(np.zeros((4, 4)), minimum=3)
    dear = facility_table(1, 4)
    plan = solve_facility([free, dear], 5, 30)
    assert [len(set(grouping)) for grouping in plan.groupings] == [3, 2]


def test_identical_experts_cost_nothing_and_join_the_lowest() -> None:
    plan = solve_facility([FacilityTable(np.zeros((4, 4)))], 2, 30)
    assert plan.cost == 0 and plan.gap == 0
    assert len(set(plan.groupings[0])) == 2
