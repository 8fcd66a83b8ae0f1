"""One budget for all: against the best recipe of one family, and whether its predictions can be trusted."""

from __future__ import annotations

import pytest

from tests.quality.comparison import best_single_family, measure_recipe
from tests.quality.harness import SEEDS, paired_interval
from tests.quality.random_plans import predict_and_measure
from tests.quality.recipes import BUDGET, strongest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("quality budget")]

MODELS = ("scratch", "upcycled")
TOLERANCE = 0.002


@pytest.mark.parametrize("keep", [0.75, 0.5, 0.25])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", MODELS)
def test_the_budget_is_not_worse_than_the_best_family(name: str, seed: int, keep: float) -> None:
    found = measure_recipe(name, BUDGET, keep, seed=seed)
    assert found.fits(keep)
    best = best_single_family((measure_recipe(name, recipe, keep, seed=seed) for recipe in strongest()), keep)
    _, upper = paired_interval(found.measured, best.measured)
    increase = found.measured.increase
    rival = f"{best.recipe.name} {best.measured.increase:+.4f}"
    print(f"{name}, seed {seed}, {keep:.0%}: {increase:+.4f}, {rival}, upper {upper:+.4f}")
    assert upper <= TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_predictions_rank_random_plans(name: str) -> None:
    """V13: 20 plans over 10 to 90 % of the bytes, mixed of all actions at random; neither solved nor refitted."""
    found = predict_and_measure(name)
    print(f"{name}: {found.rank_correlation:.3f}, shares {found.shares.min():.2f} to {found.shares.max():.2f}")
    assert len(found.shares) == 20
    assert found.rank_correlation >= 0.9
    assert found.shares.min() < 0.15 and found.shares.max() > 0.8
