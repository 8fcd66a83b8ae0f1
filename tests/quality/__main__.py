"""Loss against bytes of experts for every recipe: `make quality`, or `python -m tests.quality --model scratch`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import moec
from moec.errors import MoecError
from tests.quality import harness
from tests.quality.harness import FIXTURES, Measured, paired_interval
from tests.quality.recipes import KEEP_ALL, KEPT_SHARES, Recipe, single_families

_TOLERANCE = 0.002
"""Shares of bytes that count as equal: widths and ranks are whole numbers."""


@dataclass(frozen=True)
class Row:
    """One recipe at one budget; `other` is the increase on the text of another kind."""

    recipe: Recipe
    measured: Measured
    other: float


def measure_recipe(name: str, recipe: Recipe, keep: float) -> Row:
    """Runs a recipe on the fixture `name`, calibrated with seed 0 and gradients. Raises MoecError as its passes do."""
    module = harness.calibrated(name, gradients=True)
    moec.run_passes(module, recipe.pipeline(keep))
    return Row(recipe, harness.measure(name, module), harness.other_increase(name, module))


def best_single_family(rows: list[Row], keep: float) -> Row:
    """The recipe of one family with the least loss among those that keep to the bytes."""
    fitting = [row for row in rows if row.recipe.family.is_single and row.measured.expert_share <= keep + _TOLERANCE]
    return min(fitting, key=lambda row: row.measured.increase)


def print_table(name: str, keep: float) -> None:
    """All recipes for one fixture and one budget, each against the best of a single family."""
    print(f"\n{name}, at most {keep:.0%} of the bytes of its experts; source {harness.source_losses(name).mean():.4f}")
    print(f"{'recipe':32}{'family':18}{'bytes':>11}{'share':>8}{'increase':>10}{'other text':>12}   against the best")
    rows = []
    for recipe in (KEEP_ALL, *single_families()):
        try:
            rows.append(measure_recipe(name, recipe, keep))
        except MoecError as error:
            print(f"{recipe.name:32}{recipe.family.value:18}{error}", flush=True)
    best = best_single_family(rows, keep)
    for row in sorted(rows, key=lambda row: row.measured.increase):
        print(_line(row, best), flush=True)


def _line(row: Row, best: Row) -> str:
    measured = row.measured
    low, high = paired_interval(measured, best.measured)

    numbers = f"{measured.expert_bytes:11,}{measured.expert_share:8.1%}{measured.increase:+10.4f}{row.other:+12.4f}"
    against = "best of one family" if row is best else f"{low:+.4f} .. {high:+.4f}"
    return f"{row.recipe.name:32}{row.recipe.family.value:18}{numbers}   {against}"


def main() -> None:
    """Reads the command line and prints the tables."""
    parser = argparse.ArgumentParser(description="Measure every recipe on the trained fixtures.")
    parser.add_argument("--model", choices=sorted(FIXTURES), action="append", help="only this fixture; may be repeated")
    parser.add_argument("--keep", type=float, action="append", help="only this share of bytes; may be repeated")
    arguments = parser.parse_args()
    print("Loss in nats per byte on held-out text; intervals: paired bootstrap, 95 %, of the difference in loss")
    for name in arguments.model or FIXTURES:
        for keep in arguments.keep or KEPT_SHARES:
            print_table(name, keep)


if __name__ == "__main__":
    main()
