"""Recipes and budgets on the command line, up to the pipeline that they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.artifact.options import CompileOptions, OutputDType
from moec.errors import UnsafeInputError, UsageError
from moec.pipeline.manager import Pipeline
from moec.pipeline.recipes import find_recipe, recipes
from tests.cli.conftest import DEMO_MODEL, Command

NAMES = (
    "best", "camera-p", "compressed-experts", "d2-moe", "dern", "hc-smoe", "heapr", "m-smoe", "mc-smoe", "mole", "naee",
    "reap", "uncurl",
)  # fmt: skip


def test_every_recipe_names_its_source_and_is_a_pipeline() -> None:
    found = recipes()
    assert {recipe.name for recipe in found} >= set(NAMES)
    for recipe in found:
        assert recipe.summary.endswith(".") and recipe.source and find_recipe(recipe.name) == recipe
        pipeline = Pipeline.parse(recipe.text())
        assert pipeline.passes[0].instance.pass_name == "calibrate"
        if "$keep" in recipe.pipeline or "$drop" in recipe.pipeline:
            assert str(pipeline) != str(Pipeline.parse(recipe.text("80%")))


def test_a_budget_alone_is_the_best_recipe_in_the_type_of_the_artifact() -> None:
    options = CompileOptions(budget="60%", dtype=OutputDType.FLOAT16)
    assert "solve-budget{bytes=60% dtype=float16}" in str(Pipeline.parse(options.requested_pipeline()))
    assert "bytes=350MB" in CompileOptions(budget="350MB").requested_pipeline()
    assert "ratio=0.25" in CompileOptions(recipe="camera-p", budget="75%").requested_pipeline()
    assert CompileOptions(pipeline="cse").requested_pipeline() == "cse"


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (CompileOptions(pipeline="cse", budget="50%"), "excludes a recipe and a budget"),
        (CompileOptions(recipe="camera"), "did you mean 'camera-p'"),
        (CompileOptions(recipe="none.yaml"), "no such recipe file"),
        (CompileOptions(recipe="reap", budget="4GiB"), "takes a share of the experts, not 4GiB"),
        (CompileOptions(budget="much"), "'much' is no budget"),
    ],
)
def test_contradictions_are_refused(options: CompileOptions, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        options.requested_pipeline()
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name: x", "its fields are name, summary, source, budget, pipeline"),
        ("- a\n- b", "malformed"),
        ("a: [", "no YAML"),
        ("name: x\nsummary: x.\nsource: x\nbudget: 50%\npipeline: cse{a=$other}", "$other"),
        ("name: x\nsummary: x.\nsource: x\nbudget: 50%\npipeline: cse{a=$}", "malformed"),
        ("!!python/object/apply:os.getcwd []", "no YAML"),
    ],
)
def test_recipes_from_files(text: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(UnsafeInputError) as caught:
        find_recipe(str(path)).text()
    assert part in str(caught.value)
    path.write_text(
        "name: own\nsummary: Mine.\nsource: me\nbudget: 30%\npipeline: calibrate, solve-budget{bytes=$budget}"
    )
    assert str(Pipeline.parse(find_recipe(str(path)).text())) == "calibrate,solve-budget{bytes=30%}"


def test_moec_passes_shows_recipes(moec: Command) -> None:
    code, output, _ = moec("passes")
    assert code == 0
    assert all(f"\n{name} " in output for name in NAMES)
    code, output, _ = moec("passes", "m-smoe")
    assert code == 0
    assert "arXiv 2310.01334" in output and "merge-experts{keep=0.5 select=global}" in output


def test_mistakes_are_found_before_any_work(moec: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for arguments in (("--recipe", "nothing"), ("--budget", "200%"), ("--budget", "50%", "--calibration", "none.txt")):
        code, _, error = moec("compile", DEMO_MODEL, "-o", out, *arguments)
        assert code == 2 and error.startswith("moec: error:")
    assert not out.exists()
