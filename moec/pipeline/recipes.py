"""Named recipes: pipelines with their source, in YAML files, for a share of the experts' bytes to keep.

    name: camera-p
    summary: Drops neurons by what they add to the output of their layer.
    source: CAMERA, arXiv 2508.02322
    budget: 50%
    pipeline: calibrate,prune-micro-experts{criterion=camera ratio=$drop}

In the pipeline `$keep` and `$drop` are the share of bytes to keep and the rest of it, `$budget` is the budget as it was
given, and `$dtype` the element type of the artifact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from string import Template

import yaml

from moec.budget.sizes import parse_budget
from moec.errors import UnsafeInputError, UsageError
from moec.pipeline.options import suggestion

BEST = "best"
"""The recipe of a budget without a recipe."""

_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Recipe:
    """A pipeline as a template; `budget` is the default of what experts may take."""

    name: str
    summary: str
    source: str
    budget: str
    pipeline: str

    def text(self, budget: str = "", dtype: str = "float32") -> str:
        """The pipeline text for a budget; an empty one is the recipe's own.

        Raises UsageError for a malformed budget, and for bytes where the recipe takes a share.
        """
        wanted = budget or self.budget
        try:
            share = parse_budget(wanted).share
        except ValueError as error:
            raise UsageError(str(error), where=f"recipe {self.name}") from None
        values = {"budget": wanted, "dtype": dtype}
        if share is not None:
            values |= {"keep": f"{share:g}", "drop": f"{1 - share:g}"}
        try:
            return " ".join(Template(self.pipeline).substitute(values).split())
        except KeyError as error:
            if share is None and error.args[0] in ("keep", "drop"):
                raise UsageError(
                    f"the recipe {self.name} takes a share of the experts, not {wanted}",
                    hint="write a share such as 50%, or use the recipe best",
                ) from None
            raise UnsafeInputError(f"the recipe names ${error.args[0]}, which is not known", where=self.name) from None
        except ValueError as error:
            raise UnsafeInputError(f"the pipeline of the recipe is malformed: {error}", where=self.name) from None


def recipes() -> list[Recipe]:
    """The recipes that moec brings along, by name."""
    folder = files("moec.recipes")
    found = [_read(item.read_text(encoding="utf-8"), item.name) for item in folder.iterdir() if _is_recipe(item.name)]
    return sorted(found, key=lambda recipe: recipe.name)


def find_recipe(name: str) -> Recipe:
    """A recipe by its name, or from a YAML file.

    Raises UsageError where there is none, UnsafeInputError for a malformed file.
    """
    path = Path(name)
    if _is_recipe(path.name):
        if not path.is_file():
            raise UsageError("there is no such recipe file", where=name)
        return _read(path.read_text(encoding="utf-8"), name)
    known = {recipe.name: recipe for recipe in recipes()}
    if name not in known:
        raise UsageError(f"there is no recipe {name!r}", hint=suggestion(name, known, "the recipes"))
    return known[name]


def recipe_list_text(found: Sequence[Recipe]) -> str:
    """One line for each recipe."""
    width = max((len(recipe.name) for recipe in found), default=0)
    return "\n".join(f"{recipe.name.ljust(width)}  {recipe.summary}" for recipe in found)


def recipe_text(recipe: Recipe) -> str:
    """Everything about one recipe."""
    return (
        f"{recipe.name}: {recipe.summary}\n\nFrom: {recipe.source}.\nBudget: {recipe.budget}, or as --budget says.\n"
        f"Pipeline: {recipe.text()}"
    )


def _is_recipe(name: str) -> bool:
    return name.endswith(_SUFFIXES)


def _read(text: str, where: str) -> Recipe:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UnsafeInputError(f"the recipe is no YAML: {error}", where=where) from None
    names = [field.name for field in fields(Recipe)]
    if not isinstance(found, dict) or sorted(found) != sorted(names):
        raise UnsafeInputError("the recipe is malformed", where=where, hint=f"its fields are {', '.join(names)}")
    return Recipe(**{name: str(found[name]).strip() for name in names})
