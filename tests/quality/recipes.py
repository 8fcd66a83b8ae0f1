"""What is compared: recipes of one family each, as pipeline texts for a share of the experts' bytes to keep."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from string import Template

KEPT_SHARES = (0.75, 0.50, 0.25)


class Family(Enum):
    """What a recipe does to experts. `BASELINE` recipes are no rivals, `JOINT` ones mix families under one budget."""

    BASELINE = "baseline"
    DROP = "drop experts"
    MERGE = "merge experts"
    NARROW = "drop neurons"
    FACTOR = "factor matrices"
    JOINT = "budget"

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
        text = Template(self.template).substitute(keep=f"{keep:g}", drop=f"{1 - keep:g}")
        return f"{text},refit-down" if self.refit else text


KEEP_ALL = Recipe("keep all", Family.BASELINE, "canonicalize")

_BARE = (
    Recipe("random experts", Family.BASELINE, "prune-experts{criterion=random ratio=$drop}"),
    Recipe("random neurons", Family.BASELINE, "prune-micro-experts{criterion=random ratio=$drop}"),
    Recipe("frequency", Family.DROP, "prune-experts{criterion=frequency ratio=$drop}"),
    Recipe("reap", Family.DROP, "prune-experts{criterion=reap-sum ratio=$drop}"),
    Recipe("naee", Family.DROP, "prune-experts{criterion=naee-greedy ratio=$drop}"),
    Recipe("m-smoe", Family.MERGE, "merge-experts{keep=$keep}"),
    Recipe("hc-smoe", Family.MERGE, "merge-experts{keep=$keep grouping=mean-output align=none}"),
    Recipe("facility", Family.MERGE, "merge-experts{keep=$keep grouping=facility keep-dominant}"),
    Recipe(
        "facility, all layers", Family.MERGE, "merge-experts{keep=$keep grouping=facility keep-dominant select=global}"
    ),
    Recipe("camera", Family.NARROW, "prune-micro-experts{ratio=$drop}"),
    Recipe(
        "energy x sensitivity",
        Family.NARROW,
        "prune-micro-experts{criterion=energy-x-sensitivity scope=global ratio=$drop}",
    ),
    Recipe("heapr", Family.NARROW, "prune-micro-experts{criterion=heapr-sum scope=global ratio=$drop}"),
    Recipe("low rank", Family.FACTOR, "low-rank{ratio=$keep}"),
    Recipe("low rank, base", Family.FACTOR, "low-rank{ratio=$keep base=frequency}"),
)


def single_families() -> tuple[Recipe, ...]:
    """All recipes without a budget, those of families also with `refit-down` behind them."""
    refitted = (
        Recipe(f"{recipe.name} + refit", recipe.family, recipe.template, refit=True)
        for recipe in _BARE
        if recipe.family.is_single
    )
    return (*_BARE, *refitted)
