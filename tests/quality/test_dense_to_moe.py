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
    TINY,
    Setting,
    Source,
    dense_loss,
    expert_count,
    loss,
    neuron_level_loss,
    scales,
)

RECIPE = Source(calibration=320, gradients=False)
"""As much text as the recipe `best` calibrates on."""


def losses(
    partition: str,
    k: int,
    router: str = LEAST_SQUARES,
    source: Source = TINY,
    *,
    partition_seed: int | None = None,
    scaled: bool = False,
) -> NDArray[np.float64]:
    """One for each seed."""
    settings = [Setting(partition, router, seed, partition_seed, scaled) for seed in SEEDS]
    return np.asarray([loss(setting, k, source) for setting in settings])


def is_clearly_less(one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    """For every two seeds, and on average by more than twice the range of either over its seeds."""
    gap = float(other.mean() - one.mean())
    return bool(one.max() < other.min() and gap > 2 * max(np.ptp(one), np.ptp(other)))


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

    @pytest.mark.parametrize("partition_seed", SEEDS)
    @pytest.mark.parametrize("k", [4, 2])
    def test_least_squares_is_better_than_centroids_and_those_than_chance(self, k: int, partition_seed: int) -> None:
        """On one partition at a time: partitions differ by more than routers do."""
        best, fitted, centroid, chance = (
            losses("k-means", k, router, RECIPE, partition_seed=partition_seed)
            for router in (ORACLE, LEAST_SQUARES, CENTROID, RANDOM)
        )
        print(f"k = {k}: oracle {best}, least squares {fitted}, centroid {centroid}, random {chance}")
        assert is_clearly_less(fitted, centroid)
        # routers by chance differ too much among themselves for that, and a fit may come close to the best
        assert best.max() <= fitted.min() and centroid.max() + 0.05 < chance.min()

    @pytest.mark.parametrize("k", [4, 2])
    @pytest.mark.parametrize("partition", ["k-means", "co-activation"])
    def test_neurons_that_belong_together_lose_less_than_drawn_ones(self, partition: str, k: int) -> None:
        alike, drawn = losses(partition, k, source=RECIPE), losses("random", k, source=RECIPE)
        print(f"k = {k}: {partition} {alike}, random {drawn}")
        assert is_clearly_less(alike, drawn)

    @pytest.mark.parametrize("k", [6, 4, 2])
    @pytest.mark.parametrize("partition", ["random", "k-means", "co-activation"])
    def test_the_calibrated_scale_does_no_harm(self, partition: str, k: int) -> None:
        assert (losses(partition, k, scaled=True) <= losses(partition, k) + 0.005).all()

    def test_single_neurons_lose_less_than_experts(self) -> None:
        single, experts = neuron_level_loss(0.25), losses("k-means", 2, ORACLE)
        print(f"a quarter of the neurons one by one {single}, of the experts {experts}, dense {dense_loss()}")
        assert single < dense_loss() + 0.08
        assert (single < experts).all()
