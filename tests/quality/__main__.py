"""Loss against bytes of experts for every recipe: `make quality`, or `python -m tests.quality --model scratch`."""

from __future__ import annotations

import argparse

from moec.errors import MoecError
from tests.quality.comparison import Outcome, best_single_family, measure_recipe
from tests.quality.harness import FIXTURES, paired_interval, source_losses
from tests.quality.random_plans import predict_and_measure
from tests.quality.recipes import BUDGET, KEPT_SHARES, all_recipes, main_recipes

_MODELS = ("scratch", "upcycled", "tiny-moe")
_BYTE_LEVEL = ("scratch", "upcycled")


def print_table(name: str, keep: float) -> None:
    """Recipes for one fixture and one budget, each against the best of a single family."""
    print(f"\n{name}: at most {keep:.0%} of the bytes of its experts; its own loss {source_losses(name).mean():.4f}")
    print(f"{'recipe':32}{'family':18}{'bytes':>11}{'share':>8}{'increase':>10}{'other text':>12}   against the best")
    outcomes = []
    for recipe in all_recipes() if name in _BYTE_LEVEL else main_recipes():
        try:
            outcomes.append(measure_recipe(name, recipe, keep, other=True))
        except MoecError as error:
            print(f"{recipe.name:32}{recipe.family.value:18}{error}", flush=True)
    best = best_single_family(outcomes, keep)
    for outcome in sorted(outcomes, key=lambda outcome: outcome.measured.increase):
        print(_line(outcome, best, keep), flush=True)


def _line(outcome: Outcome, best: Outcome, keep: float) -> str:
    recipe, measured = outcome.recipe, outcome.measured
    low, high = paired_interval(measured, best.measured)
    against = "best of one family" if outcome is best else f"{low:+.4f} .. {high:+.4f}"
    if recipe is BUDGET:
        against += "  <-- within +0.002" if high <= 0.002 else "  <-- NOT within +0.002"
    elif recipe.family.is_single and not outcome.fits(keep):
        against += "  (over the budget)"
    numbers = f"{measured.expert_bytes:11,}{measured.expert_share:8.1%}{measured.increase:+10.4f}{outcome.other:+12.4f}"
    return f"{recipe.name:32}{recipe.family.value:18}{numbers}   {against}"


def print_predictions(name: str) -> None:
    """The rank correlation of predicted with measured losses over random plans."""
    found = predict_and_measure(name)
    print(
        f"\n{name}: predicted against measured increase over {len(found.shares)} random plans with "
        f"{found.shares.min():.0%} to {found.shares.max():.0%} of the bytes: Spearman {found.rank_correlation:.3f}, "
        f"measured / predicted {(found.measured / found.predicted).min():.2f} to "
        f"{(found.measured / found.predicted).max():.2f}",
        flush=True,
    )


def main() -> None:
    """Reads the command line and prints the tables."""
    parser = argparse.ArgumentParser(description="Measure every recipe on the trained fixtures.")
    parser.add_argument("--model", choices=sorted(FIXTURES), action="append", help="only this fixture; may be repeated")
    parser.add_argument("--keep", type=float, action="append", help="only this share of bytes; may be repeated")
    arguments = parser.parse_args()
    print("Loss in nats per byte on held-out text; intervals: paired bootstrap, 95 %, of the difference in loss")
    models = arguments.model or _MODELS
    for name in models:
        for keep in arguments.keep or KEPT_SHARES:
            print_table(name, keep)
    for name in _BYTE_LEVEL:
        if name in models:
            print_predictions(name)


if __name__ == "__main__":
    main()
