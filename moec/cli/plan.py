"""`moec plan`: predicts what `moec compile` would cost, from the config alone."""

from __future__ import annotations

import dataclasses
import json

import typer

from moec.artifact.options import Check, CompileOptions, OptimizeFor, OutputDType
from moec.cli.common import (
    BudgetOption,
    CalibrationOption,
    CheckOption,
    DTypeOption,
    JsonOption,
    OptimizeForOption,
    OthersOption,
    PipelineOption,
    PluginsOption,
    RecipeOption,
    SeedOption,
    SourceArgument,
    TargetOption,
    WeightsInPlaceOption,
    load_plugins,
    table,
)


def plan(
    source: SourceArgument,
    others: OthersOption = None,
    pipeline: PipelineOption = "",
    recipe: RecipeOption = "",
    budget: BudgetOption = "",
    calibration: CalibrationOption = None,
    target: TargetOption = "portable",
    dtype: DTypeOption = OutputDType.FLOAT32,
    optimize_for: OptimizeForOption = OptimizeFor.DECODE,
    check: CheckOption = Check.CHANGED,
    seed: SeedOption = 0,
    weights_in_place: WeightsInPlaceOption = False,
    plugins: PluginsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predicts time, memory and disk of a compilation; reads config.json only and writes nothing."""
    from moec.artifact.plan import plan_compilation
    from moec.artifact.report import format_size

    load_plugins(plugins)
    options = CompileOptions(
        pipeline=pipeline,
        recipe=recipe,
        budget=budget,
        calibration=calibration,
        target=target,
        dtype=dtype,
        optimize_for=optimize_for,
        check=check,
        seed=seed,
        weights_in_place=weights_in_place,
        others=tuple(others or ()),
    )
    found = plan_compilation(source, options)
    if as_json:
        facts = dataclasses.asdict(found)
        facts["cost"] = found.cost.model_dump()
        typer.echo(json.dumps(facts, indent=2))
        return
    rows = [
        ("architecture", found.architecture),
        ("parameters", f"{found.parameters:,}"),
        ("layers", f"{found.layers:,}"),
        ("experts", f"{found.experts:,}"),
        ("time", f"{found.cost.seconds:,.0f} s"),
        ("memory", format_size(found.cost.memory_bytes)),
        ("disk", format_size(found.cost.disk_bytes)),
    ]
    typer.echo(table(rows))
