"""What is compared: pipelines for a share of the experts' bytes to keep, to run behind `calibrate{gradients}`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from string import Template

from moec.frontend.model_kind import ModelKind
from moec.pipeline.recipes import BEST, find_recipe

KEPT_SHARES = (0.75, 0.50, 0.25)


class Family(Enum):
    """What a recipe does to experts. `BASELINE` recipes are no rivals, `JOINT` ones mix families under one budget."""

    BASELINE = "baseline"
    DROP = "drop experts"
    MERGE = "merge experts"
    NARROW = "drop neurons"
    FACTOR = "factor matrices"
    JOINT = "several"

    @property
    def is_single(self) -> bool:
        """Whether its recipes are those that a budget has to match."""
        return self not in (Family.BASELINE, Family.JOINT)


@dataclass(frozen=True)
class Recipe:
    """`template`: pipeline text in which `$keep` is the share of bytes to keep, `$drop` the rest of it."""

    name: str
    family: Family
    template: str
    refit: bool = False

    def pipeline(self, keep: float) -> str:
        """The pipeline text for a share."""
        text = Template(self.template).substitute(keep=f"{keep:g}", drop=f"{1 - keep:g}", budget=f"{100 * keep:g}%")
        return f"{text},refit-down" if self.refit else text


def _published(name: str, family: Family) -> Recipe:
    """A recipe of `moec compile --recipe`, without the calibration in front of it."""
    found = find_recipe(name, ModelKind.MOE)
    calibrate, _, rest = found.pipeline.partition(",")
    assert calibrate.startswith("calibrate")
    given = {**found.parameters, "dtype": "float32"}
    return Recipe(name, family, Template(" ".join(rest.split())).safe_substitute(given))


KEEP_ALL = Recipe("keep all", Family.BASELINE, "canonicalize")
BUDGET = Recipe("--budget", Family.JOINT, _published(BEST, Family.JOINT).template)

_SINGLE = (
    Recipe("frequency", Family.DROP, "prune-experts{criterion=frequency ratio=$drop}"),
    _published("reap", Family.DROP),
    _published("naee", Family.DROP),
    _published("dern", Family.MERGE),
    _published("m-smoe", Family.MERGE),
    _published("hc-smoe", Family.MERGE),
    _published("uncurl", Family.MERGE),
    Recipe("facility", Family.MERGE, "merge-experts{keep=$keep grouping=facility keep-dominant}"),
    Recipe("facility, averaged", Family.MERGE, "merge-experts{keep=$keep grouping=facility align=activation}"),
    Recipe(
        "facility, averaged, global",
        Family.MERGE,
        "merge-experts{keep=$keep grouping=facility align=activation weights=saliency select=global}",
    ),
    _published("camera-p", Family.NARROW),
    _published("heapr", Family.NARROW),
    Recipe(
        "energy x sensitivity",
        Family.NARROW,
        "prune-micro-experts{criterion=energy-x-sensitivity scope=global ratio=$drop}",
    ),
    Recipe("low rank", Family.FACTOR, "low-rank{ratio=$keep}"),
    _published("d2-moe", Family.FACTOR),
    _published("mole", Family.FACTOR),
)

_BASELINES = (
    KEEP_ALL,
    Recipe("random experts", Family.BASELINE, "prune-experts{criterion=random ratio=$drop}"),
    Recipe("random neurons", Family.BASELINE, "prune-micro-experts{criterion=random ratio=$drop}"),
)


_STRONGEST = (
    "heapr + refit",
    "energy x sensitivity + refit",
    "camera-p + refit",
    "facility, averaged, global + refit",
    "d2-moe + refit",
    "mole",
    "mole + refit",
)
"""What was best of its family, at one budget or another, on the two byte-level models."""


def single_families() -> tuple[Recipe, ...]:
    """The recipes of one family, as they are and with `refit-down` behind them."""
    refitted = (Recipe(f"{recipe.name} + refit", recipe.family, recipe.template, refit=True) for recipe in _SINGLE)
    return (*_SINGLE, *refitted)


def strongest() -> tuple[Recipe, ...]:
    """Those of one family that a budget has to fear."""
    found = tuple(recipe for recipe in single_families() if recipe.name in _STRONGEST)
    assert len(found) == len(_STRONGEST)
    return found


def all_recipes() -> tuple[Recipe, ...]:
    """Everything that the table of a byte-level model shows."""
    return (*_BASELINES, *single_families(), _published("mc-smoe", Family.JOINT), BUDGET)


def main_recipes() -> tuple[Recipe, ...]:
    """What the table of the larger model shows: each recipe takes several times as long there."""
    return (*_BASELINES, *strongest(), BUDGET)
