"""Recipes and budgets on the command line, up to the pipeline that they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moec.artifact.options import CompileOptions, OutputDType
from moec.errors import UnsafeInputError, UsageError
from moec.frontend.model_kind import ModelKind, model_shape
from moec.pipeline.manager import Pipeline
from moec.pipeline.recipes import find_recipe, recipes
from tests.cli.conftest import DEMO_MODEL, EXAMPLES, Command

DENSE_MODEL = EXAMPLES / "models" / "tiny-dense"
MOE, DENSE = ModelKind.MOE, ModelKind.DENSE
NAMES = (
    "best", "camera-p", "cmoe", "compressed-experts", "d2-moe", "deepseek-segment", "dern", "factorllm", "hc-smoe",
    "heapr", "llama-moe", "m-smoe", "mc-smoe", "moefication", "mole", "naee", "read-me", "reap", "smoe-dropout",
    "uncurl", "union-of-experts",
)  # fmt: skip


def test_every_recipe_names_its_source_and_is_a_pipeline() -> None:
    found = recipes()
    assert {recipe.name for recipe in found} >= set(NAMES)
    assert len({(recipe.name, recipe.model) for recipe in found}) == len(found)
    for recipe in found:
        assert recipe.summary.endswith(".") and recipe.source and find_recipe(recipe.name, recipe.model) == recipe
        pipeline = Pipeline.parse(recipe.text())
        if recipe.budget:
            assert pipeline.passes[0].instance.pass_name == "calibrate" and recipe.model is ModelKind.MOE
        for name, value in recipe.parameters.items():
            assert f"${name}" in recipe.pipeline and recipe.text(settings={name: value}) == recipe.text()
        if "$keep" in recipe.pipeline or "$drop" in recipe.pipeline:
            assert str(pipeline) != str(Pipeline.parse(recipe.text("80%")))


def test_a_budget_alone_is_the_best_recipe_in_the_type_of_the_artifact() -> None:
    options = CompileOptions(budget="60%", dtype=OutputDType.FLOAT16)
    assert "solve-budget{bytes=60% refit dtype=float16}" in str(Pipeline.parse(options.requested_pipeline(MOE)))
    assert "bytes=350MB" in CompileOptions(budget="350MB").requested_pipeline(MOE)
    assert "ratio=0.25" in CompileOptions(recipe="camera-p", budget="75%").requested_pipeline(MOE)
    assert CompileOptions(pipeline="cse").requested_pipeline(MOE) == "cse"


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (CompileOptions(pipeline="cse", budget="50%"), "excludes a recipe and a budget"),
        (CompileOptions(recipe="camera_p"), "did you mean 'camera-p'"),
        (CompileOptions(recipe="none.yaml"), "no such recipe file"),
        (CompileOptions(recipe="reap", budget="4GiB"), "takes a share of the experts, not 4GiB"),
        (CompileOptions(budget="much"), "'much' is no budget"),
        (CompileOptions(recipe="reap{k=2}"), "has no parameter 'k'"),
        (CompileOptions(recipe="reap{k"), "missing '}'"),
        (CompileOptions(recipe="best{k=2},cse"), "is no recipe with parameters"),
    ],
)
def test_contradictions_are_refused(options: CompileOptions, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        options.requested_pipeline(MOE)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name: x", "its fields are name, summary, source, pipeline"),
        ("- a\n- b", "malformed"),
        ("a: [", "no YAML"),
        ("name: x\nsummary: x.\nsource: x\nbudget: 50%\npipeline: cse{a=$other}", "$other"),
        ("name: x\nsummary: x.\nsource: x\nbudget: 50%\npipeline: cse{a=$}", "malformed"),
        ("name: x\nsummary: x.\nsource: x\nmodel: sparse\npipeline: cse", "model is one of dense, moe and any"),
        (
            "name: x\nsummary: x.\nsource: x\nparameters: {keep: 1}\npipeline: cse",
            "parameters of the recipe are malformed",
        ),
        ("name: x\nsummary: x.\nsource: x\nbudget: 5%\nother: 1\npipeline: cse", "malformed"),
        ("!!python/object/apply:os.getcwd []", "no YAML"),
    ],
)
def test_recipes_from_files(text: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(UnsafeInputError) as caught:
        find_recipe(str(path), MOE).text()
    assert part in str(caught.value)
    path.write_text(
        "name: own\nsummary: Mine.\nsource: me\nbudget: 30%\npipeline: calibrate, solve-budget{bytes=$budget}"
    )
    assert str(Pipeline.parse(find_recipe(str(path), MOE).text())) == "calibrate,solve-budget{bytes=30%}"


def test_the_source_decides_between_recipes_of_one_name() -> None:
    assert [model_shape(folder).kind for folder in (DENSE_MODEL, DEMO_MODEL)] == [DENSE, MOE]
    options = CompileOptions(recipe="best")
    assert "solve-budget" in options.requested_pipeline(MOE)
    assert "bits" not in str(Pipeline.parse(options.requested_pipeline(MOE)))
    coded = CompileOptions(recipe="best{bits=4,3,2}", budget="25%").requested_pipeline(MOE)
    assert "bytes=25%" in coded and "bits=4,3,2" in str(Pipeline.parse(coded))
    made = str(Pipeline.parse(options.requested_pipeline(DENSE)))
    assert "factorize{experts=8 uneven=pad}" in made and "set-routing{k=4 combine=softmax" in made
    other = str(Pipeline.parse(CompileOptions(recipe="best{experts=16 k=2}").requested_pipeline(DENSE)))
    assert "factorize{experts=16 uneven=pad}" in other and "set-routing{k=2 combine=softmax" in other
    assert CompileOptions(recipe="folder/own.yaml{k=2}").recipe_title == "own.yaml{k=2}"


@pytest.mark.parametrize(
    ("options", "model", "parts"),
    [
        (CompileOptions(recipe="reap"), DENSE, ("reap is for models with experts", "recipes for it are", "best, ")),
        (CompileOptions(budget="50%"), DENSE, ("this model has none", "--recipe 'best{k=2}'")),
        (CompileOptions(recipe="best", budget="50%"), DENSE, ("does not shrink", "experts, k, sequences, length")),
        (CompileOptions(recipe="best{kk=4}"), DENSE, ("no parameter 'kk'", "did you mean 'k'")),
        (CompileOptions(recipe="best{k=2}"), MOE, ("no parameter 'k'", "bits")),
        (CompileOptions(recipe="reap{k=2}"), MOE, ("no parameter 'k'", "moec passes reap")),
    ],
)
def test_recipes_for_other_models_are_refused(
    options: CompileOptions, model: ModelKind, parts: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as caught:
        options.requested_pipeline(model)
    assert all(part in str(caught.value) for part in parts)


def test_moec_passes_shows_recipes(moec: Command) -> None:
    code, output, _ = moec("passes")
    assert code == 0
    assert all(f"\n{name} " in output for name in NAMES)
    code, output, _ = moec("passes", "m-smoe")
    assert code == 0
    assert "arXiv 2310.01334" in output and "merge-experts{keep=0.5 select=global}" in output
    code, output, _ = moec("passes", "best")
    assert code == 0
    assert "models with experts" in output and "Parameters: best{experts=8 k=" in output
    code, output, _ = moec("passes", "best", "--json")
    assert [recipe["model"] for recipe in json.loads(output)] == ["moe", "dense"]


def test_mistakes_are_found_before_any_work(moec: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for arguments in (("--recipe", "nothing"), ("--budget", "200%"), ("--budget", "50%", "--calibration", "none.txt")):
        code, _, error = moec("compile", DEMO_MODEL, "-o", out, *arguments)
        assert code == 2 and error.startswith("moec: error:")
    for arguments in (("--recipe", "reap"), ("--budget", "50%"), ("--recipe", "best{k=0.5}")):
        code, _, error = moec("compile", DENSE_MODEL, "-o", out, *arguments)
        assert code == 2 and error.startswith("moec: error:")
    assert not out.exists()


@pytest.mark.slow
def test_a_recipe_with_parameters_becomes_an_artifact(moec: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, output, _ = moec(
        "compile", DENSE_MODEL, "-o", out, "--recipe", "best{k=2 sequences=80}", "--store", tmp_path / "store"
    )
    assert code == 0 and "4 of 4 layers with experts" in output and "set-routing{k=2 scale=calibrated}" in output
    manifest = json.loads((out / "moec.json").read_text())
    assert manifest["build"]["recipe"] == "best{k=2 sequences=80}"
