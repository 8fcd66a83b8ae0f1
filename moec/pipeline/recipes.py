"""Named recipes: pipelines with their source, in YAML files, for models with or without experts.

    name: camera-p
    summary: Drops neurons by what they add to the output of their layer.
    source: CAMERA, arXiv 2508.02322
    model: moe
    budget: 50%
    parameters: {sequences: 128}
    pipeline: calibrate{sequences=$sequences},prune-micro-experts{criterion=camera ratio=$drop}

`model` says which models the recipe is for: dense, moe, or any. Two recipes of one name are for different ones; the
source decides between them. A recipe with a `budget` makes experts smaller: in its pipeline `$keep` and `$drop` are the
share of bytes to keep and the rest of it, `$budget` is the budget as it was given. `$dtype` is the element type of the
artifact. `parameters` are further names with their defaults, which `--recipe 'camera-p{sequences=64}'` sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from string import Template

import yaml

from moec.budget.sizes import Budget, parse_budget
from moec.errors import UnsafeInputError, UsageError
from moec.frontend.model_kind import ModelKind
from moec.pipeline.options import suggestion
from moec.pipeline.spec import PassSpec, parse_pipeline_text

BEST = "best"
"""The recipe of a budget without a recipe."""

_SUFFIXES = (".yaml", ".yml")
_REQUIRED = ("name", "summary", "source", "pipeline")
_OPTIONAL = ("model", "budget", "parameters")
_RESERVED = ("budget", "keep", "drop", "dtype")
_ORDER = (ModelKind.MOE, ModelKind.DENSE, ModelKind.ANY)


@dataclass(frozen=True)
class Recipe:
    """A pipeline as a template; `budget` is the default of what experts may take, empty where the recipe shrinks none.

    `parameters` are the names that a user may set, with their defaults.
    """

    name: str
    summary: str
    source: str
    pipeline: str
    model: ModelKind = ModelKind.ANY
    budget: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)

    def text(self, budget: str = "", dtype: str = "float32", settings: Mapping[str, str] | None = None) -> str:
        """The pipeline text for a budget and for other values of parameters; an empty budget is the recipe's own.

        Raises UsageError for a malformed budget, for bytes where the recipe takes a share, for a budget where it takes
        none, and for a parameter that it does not have.
        """
        values = {"dtype": dtype, **self._budget_values(budget), **self.parameters}
        for name, value in (settings or {}).items():
            if name not in self.parameters:
                raise UsageError(
                    f"the recipe {self.name} has no parameter {name!r}",
                    hint=suggestion(name, self.parameters, "its parameters")
                    if self.parameters
                    else "it has none; write its pipeline out to change it: moec passes " + self.name,
                )
            values[name] = value
        try:
            return " ".join(Template(self.pipeline).substitute(values).split())
        except KeyError as error:
            if error.args[0] in ("keep", "drop") and "budget" in values:
                raise UsageError(
                    f"the recipe {self.name} takes a share of the experts, not {values['budget']}",
                    hint="write a share such as 50%, or use the recipe best",
                ) from None
            raise UnsafeInputError(f"the recipe names ${error.args[0]}, which is not known", where=self.name) from None
        except ValueError as error:
            raise UnsafeInputError(f"the pipeline of the recipe is malformed: {error}", where=self.name) from None

    def _budget_values(self, budget: str) -> dict[str, str]:
        if not self.budget:
            if budget:
                raise UsageError(
                    f"the recipe {self.name} makes experts, it does not shrink them to a budget",
                    hint=f"leave --budget out; it has the parameters {', '.join(self.parameters) or '(none)'}",
                )
            return {}
        wanted = budget or self.budget
        try:
            share = parse_budget(wanted).share
        except ValueError as error:
            raise UsageError(str(error), where=f"recipe {self.name}") from None
        shares = {} if share is None else {"keep": f"{share:g}", "drop": f"{1 - share:g}"}
        return {"budget": wanted, **shares}


@dataclass(frozen=True)
class RecipeRequest:
    """What a user asked for: the name or the file of a recipe, and values of its parameters."""

    name: str
    settings: Mapping[str, str]

    @staticmethod
    def parse(text: str) -> RecipeRequest:
        """`best`, `own.yaml`, `best{experts=16 k=4}`; raises UsageError for other text."""
        name, brace, rest = text.partition("{")
        if not brace:
            return RecipeRequest(text, {})
        items = parse_pipeline_text(f"recipe{brace}{rest}")
        if len(items) != 1 or not isinstance(items[0], PassSpec):
            raise UsageError(f"{text!r} is no recipe with parameters", hint="write it as 'best{experts=16 k=4}'")
        # pipeline text joins words by -, parameters by _
        settings = {key.replace("-", "_"): "true" if value is None else value for key, value in items[0].options}
        return RecipeRequest(name, settings)

    @property
    def title(self) -> str:
        """The request without the folder of a file."""
        values = " ".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{Path(self.name).name}{{{values}}}" if values else Path(self.name).name


def recipes() -> list[Recipe]:
    """The recipes that moec brings along, by name; those for models with experts before others of the same name."""
    folder = files("moec.recipes")
    found = [_read(item.read_text(encoding="utf-8"), item.name) for item in folder.iterdir() if _is_recipe(item.name)]
    return sorted(found, key=lambda recipe: (recipe.name, _ORDER.index(recipe.model)))


def find_recipe(name: str, model: ModelKind) -> Recipe:
    """A recipe for a kind of models by its name, or from a YAML file.

    Raises UsageError where there is none, or none for such models; UnsafeInputError for a malformed file.
    """
    path = Path(name)
    if _is_recipe(path.name):
        if not path.is_file():
            raise UsageError("there is no such recipe file", where=name)
        found = [_read(path.read_text(encoding="utf-8"), name)]
    else:
        known = recipes()
        found = [recipe for recipe in known if recipe.name == name]
        if not found:
            names = [recipe.name for recipe in known]
            raise UsageError(f"there is no recipe {name!r}", hint=suggestion(name, names, "the recipes"))
    for recipe in found:
        if recipe.model.takes(model):
            return recipe
    others = [recipe.name for recipe in recipes() if recipe.model.takes(model)]
    raise UsageError(
        f"the recipe {Path(name).name} is for {_KIND_TEXTS[found[0].model]}, and this is {_SOURCE_TEXTS[model]}",
        hint=f"recipes for it are {', '.join(others)}",
    )


_KIND_TEXTS = {
    ModelKind.DENSE: "models without experts",
    ModelKind.MOE: "models with experts",
    ModelKind.ANY: "all models",
}
_SOURCE_TEXTS = {
    ModelKind.DENSE: "a model without experts",
    ModelKind.MOE: "a model with experts",
    ModelKind.ANY: "any model",
}


def requested_pipeline(recipe: str, budget: str, dtype: str, model: ModelKind) -> str:
    """The pipeline text of a recipe and a budget for a kind of models; without a recipe that of `best`.

    Raises UsageError as `find_recipe` and `Recipe.text`, and for a budget alone where the model has no experts.
    """
    if not recipe and model is ModelKind.DENSE:
        raise UsageError(
            "a budget is for the bytes of experts, and this model has none",
            hint=f"--recipe {BEST} makes experts of its feed-forward blocks; --recipe '{BEST}{{k=2}}' sets how many of "
            "them a token runs",
        )
    request = RecipeRequest.parse(recipe or BEST)
    return find_recipe(request.name, model).text(budget, dtype, request.settings)


def requested_size(recipe: str, budget: str, model: ModelKind) -> Budget | None:
    """What a recipe and a budget leave of the bytes of the experts, or of all weights; None where nothing says.

    Raises UsageError as `requested_pipeline`.
    """
    if not recipe and not budget:
        return None
    text = budget or find_recipe(RecipeRequest.parse(recipe).name, model).budget
    return parse_budget(text) if text and model is ModelKind.MOE else None


def recipe_list_text(found: Sequence[Recipe]) -> str:
    """One line for each recipe."""
    width = max((len(recipe.name) for recipe in found), default=0)
    return "\n".join(f"{recipe.name.ljust(width)}  {recipe.model.value.ljust(5)}  {recipe.summary}" for recipe in found)


def recipe_text(recipe: Recipe) -> str:
    """Everything about one recipe."""
    lines = [f"{recipe.name}: {recipe.summary}", "", f"From: {recipe.source}.", f"For: {_KIND_TEXTS[recipe.model]}."]
    if recipe.budget:
        lines.append(f"Budget: {recipe.budget}, or as --budget says.")
    if recipe.parameters:
        values = " ".join(f"{name}={value}" for name, value in recipe.parameters.items())
        lines.append(f"Parameters: {recipe.name}{{{values}}}")
    lines.append(f"Pipeline: {recipe.text()}")
    return "\n".join(lines)


def recipe_dictionary(recipe: Recipe) -> dict[str, object]:
    """The recipe as plain data for JSON."""
    return {
        "name": recipe.name,
        "summary": recipe.summary,
        "source": recipe.source,
        "model": recipe.model.value,
        "budget": recipe.budget,
        "parameters": dict(recipe.parameters),
        "pipeline": recipe.pipeline,
    }


def _is_recipe(name: str) -> bool:
    return name.endswith(_SUFFIXES)


def _read(text: str, where: str) -> Recipe:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UnsafeInputError(f"the recipe is no YAML: {error}", where=where) from None
    names = f"its fields are {', '.join(_REQUIRED)}, and there may be {', '.join(_OPTIONAL)}"
    if not isinstance(found, dict) or not set(_REQUIRED) <= set(found) <= {*_REQUIRED, *_OPTIONAL}:
        raise UnsafeInputError("the recipe is malformed", where=where, hint=names)
    parameters = found.get("parameters") or {}
    if not isinstance(parameters, dict) or not all(
        isinstance(name, str) and name.isidentifier() and name not in _RESERVED and not isinstance(value, dict | list)
        for name, value in parameters.items()
    ):
        raise UnsafeInputError(
            "the parameters of the recipe are malformed",
            where=where,
            hint=f"they are names with one value each, none of them {', '.join(_RESERVED)}",
        )
    model = str(found.get("model", ModelKind.ANY.value)).strip()
    if model not in [kind.value for kind in _ORDER]:
        raise UnsafeInputError(
            f"the recipe is for {model!r} models", where=where, hint="model is one of dense, moe and any"
        )
    return Recipe(
        str(found["name"]).strip(),
        str(found["summary"]).strip(),
        str(found["source"]).strip(),
        str(found["pipeline"]).strip(),
        model=ModelKind(model),
        budget=str(found.get("budget") or "").strip(),
        parameters={name: _plain(value) for name, value in parameters.items()},
    )


def _plain(value: object) -> str:
    """A YAML value as pipeline text writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value).strip()
