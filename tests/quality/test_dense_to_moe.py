"""Dense to MoE on a trained model: which router and partition lose less, on three seeds of the calibration."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.quality.dense_to_moe import (
    ACTIVE,
    CENTROID,
    EXPERTS,
    LEAST_SQUARES,
    ORACLE,
    PARTITIONS,
    RANDOM,
    SEEDS,
    Setting,
    Source,
    dense_loss,
    expert_count,
    loss,
    neuron_level_loss,
    scales,
)


def losses(partition: str, k: int, router: str = LEAST_SQUARES, *, scaled: bool = False) -> NDArray[np.float64]:
    """One for each seed."""
    return np.asarray([loss(Setting(partition, router, seed, scaled), k) for seed in SEEDS])


def test_a_fitted_router_is_better_than_chance_and_all_experts_are_the_model() -> None:
    quick = Source(calibration=72, heldout=12, gradients=False)
    fitted, chance = Setting("k-means"), Setting("k-means", RANDOM)
    assert abs(loss(fitted, EXPERTS, quick) - dense_loss(quick)) < 1e-5
    assert loss(fitted, 4, quick) + 0.05 < loss(chance, 4, quick)


@pytest.mark.slow
@pytest.mark.xdist_group("quality-dense")
class TestOrderings:
    @pytest.mark.parametrize("partition", PARTITIONS)
    def test_all_experts_are_the_dense_model(self, partition: str) -> None:
        setting = Setting(partition)
        count = expert_count(setting)
        assert abs(loss(setting, count) - dense_loss()) < 1e-5
        assert all(abs(scale - 1) < 1e-6 for scale in scales(setting, count))

    @pytest.mark.parametrize("partition", PARTITIONS)
    def test_more_experts_are_no_worse(self, partition: str) -> None:
        setting = Setting(partition)
        missing = EXPERTS - expert_count(setting)
        found = [loss(setting, k - missing) for k in ACTIVE]
        assert all(more <= fewer + 0.01 for more, fewer in pairwise(found)), found

    @pytest.mark.parametrize("k", [4, 2])
    def test_least_squares_is_better_than_centroids_and_those_than_chance(self, k: int) -> None:
        best, fitted, centroid, chance = (
            losses("k-means", k, router) for router in (ORACLE, LEAST_SQUARES, CENTROID, RANDOM)
        )
        print(f"k = {k}: oracle {best}, least squares {fitted}, centroid {centroid}, random {chance}")
        assert (best < fitted).all() and (fitted < centroid).all() and (centroid + 0.05 < chance).all()

    @pytest.mark.parametrize(("k", "margin"), [(4, 0.01), (2, 0.03)])
    @pytest.mark.parametrize("partition", ["k-means", "co-activation"])
    def test_neurons_that_belong_together_lose_less_than_drawn_ones(
        self, partition: str, k: int, margin: float
    ) -> None:
        alike, drawn = losses(partition, k), losses("random", k)
        print(f"k = {k}: {partition} {alike}, random {drawn}")
        assert alike.max() + margin < drawn.min()

    @pytest.mark.parametrize("k", [6, 4, 2])
    @pytest.mark.parametrize("partition", ["random", "k-means", "co-activation"])
    def test_the_calibrated_scale_does_no_harm(self, partition: str, k: int) -> None:
        assert (losses(partition, k, scaled=True) <= losses(partition, k) + 0.005).all()

    def test_single_neurons_lose_less_than_experts(self) -> None:
        single, experts = neuron_level_loss(0.25), losses("k-means", 2, ORACLE)
        print(f"a quarter of the neurons one by one {single}, of the experts {experts}, dense {dense_loss()}")
        assert single < dense_loss() + 0.08
        assert (single < experts).all()
