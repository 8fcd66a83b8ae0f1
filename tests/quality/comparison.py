"""Recipes measured on the fixtures, and the best of those that stay within a budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import moec
from tests.quality import harness
from tests.quality.harness import Measured
from tests.quality.recipes import Recipe

_TOLERANCE = 0.002
"""Shares of bytes that count as equal: widths and ranks are whole numbers."""


@dataclass(frozen=True)
class Outcome:
    """One recipe on one fixture; `other` is the increase on text of another kind than the calibration text."""

    recipe: Recipe
    measured: Measured
    other: float

    def fits(self, keep: float) -> bool:
        """Whether the experts take at most that share of their bytes."""
        return self.measured.expert_share <= keep + _TOLERANCE


def measure_recipe(name: str, recipe: Recipe, keep: float, *, seed: int = 0, other: bool = False) -> Outcome:
    """Runs a recipe on a fixture that is calibrated with gradients on the windows of `seed`.

    `other` asks for the other text's loss, else 0. Raises MoecError as the passes do.
    """
    module = harness.calibrated(name, seed, gradients=True)
    moec.run_passes(module, recipe.pipeline(keep), seed=seed)
    return Outcome(recipe, harness.measure(name, module), harness.other_increase(name, module) if other else 0.0)


def best_single_family(outcomes: Iterable[Outcome], keep: float) -> Outcome:
    """The recipe of one family with the least loss among those within the budget."""
    fitting = [outcome for outcome in outcomes if outcome.recipe.family.is_single and outcome.fits(keep)]
    return min(fitting, key=lambda outcome: outcome.measured.increase)
