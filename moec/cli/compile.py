"""`moec compile`: a model folder in, a verified artifact out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moec.artifact.options import (
    Activations,
    Check,
    CheckpointDType,
    CompileOptions,
    OptimizeFor,
    OutputDType,
    default_store,
)
from moec.cli.common import (
    ActivationsOption,
    ArchitecturesOption,
    BudgetOption,
    CalibrationOption,
    CheckOption,
    CheckpointDTypeOption,
    DTypeOption,
    EmitOption,
    OptimizeForOption,
    OthersOption,
    PipelineOption,
    PluginsOption,
    RecipeOption,
    SeedOption,
    ShardSizeOption,
    SourceArgument,
    StoreOption,
    TargetOption,
    UniformOption,
    WeightsInPlaceOption,
    checkpoint_options,
    load_plugins,
    parse_emit,
    table,
)


def compile_command(
    source: SourceArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Folder to write; must not exist.")],
    others: OthersOption = None,
    pipeline: PipelineOption = "",
    recipe: RecipeOption = "",
    budget: BudgetOption = "",
    calibration: CalibrationOption = None,
    emit: EmitOption = "onnx",
    target: TargetOption = "portable",
    dtype: DTypeOption = OutputDType.FLOAT32,
    optimize_for: OptimizeForOption = OptimizeFor.DECODE,
    activations: ActivationsOption = Activations.FLOAT32,
    check: CheckOption = Check.CHANGED,
    seed: SeedOption = 0,
    weights_in_place: WeightsInPlaceOption = False,
    uniform: UniformOption = False,
    checkpoint_dtype: CheckpointDTypeOption = CheckpointDType.AUTO,
    shard_size: ShardSizeOption = "5GB",
    architectures: ArchitecturesOption = "",
    store: StoreOption = None,
    text: Annotated[Path | None, typer.Option(help="Text for checks and verification.")] = None,
    verify: Annotated[bool, typer.Option(help="Compare the artifact with the source before it is kept.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace the artifact that OUT holds already.")] = False,
    print_ir_after_all: Annotated[bool, typer.Option(help="Print the IR after every pass to standard error.")] = False,
    time_passes: Annotated[bool, typer.Option("--time-passes", help="Print the time of every pass.")] = False,
    plugins: PluginsOption = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print what passes refused, and why.")] = False,
    reproducer: Annotated[
        Path | None, typer.Option(help="File for the IR before a pass that fails, for `moec opt --run-reproducer`.")
    ] = None,
) -> None:
    """Compiles a model into a verified artifact."""
    from moec.artifact.compilation import compile_folder
    from moec.artifact.memory import give_back_freed_memory
    from moec.artifact.report import format_size
    from moec.cli.progress import progress
    from moec.pipeline.instruments import Instrument, IRPrinting

    give_back_freed_memory()
    load_plugins(plugins)
    options = CompileOptions(
        pipeline=pipeline,
        recipe=recipe,
        budget=budget,
        calibration=calibration,
        target=target,
        dtype=dtype,
        optimize_for=optimize_for,
        activations=activations,
        check=check,
        seed=seed,
        weights_in_place=weights_in_place,
        verify=verify,
        text=text,
        store=store or default_store(),
        others=tuple(others or ()),
        emit=parse_emit(emit),
        checkpoint=checkpoint_options(uniform, checkpoint_dtype, shard_size),
        architectures=tuple(architectures.split(",")) if architectures else (),
    )
    observers: list[Instrument] = []
    if print_ir_after_all:
        observers.append(IRPrinting(lambda line: typer.echo(line, err=True), after=frozenset("*")))
    with progress() as show:
        result = compile_folder(
            source, output, options, replace=force, observers=observers, reproducer=reproducer, progress=show
        )
    report = result.report
    typer.echo(
        f"{report.title}: {report.architecture}, {report.parameters:,} parameters "
        f"({report.active_parameters:,} active per token), {sum(bool(layer.classes) for layer in report.layers)} of "
        f"{sum(layer.kind != 'other' for layer in report.layers)} layers with experts"
    )
    typer.echo()
    losses = any(entry.loss_change is not None for entry in report.ledger)
    rows = [("pass", "claim", "check", "operations", "bytes", *(["nats per token"] if losses else []))]
    for entry in report.ledger:
        change = "" if entry.loss_change is None else f"{entry.loss_change:+.4f}"
        rows.append(
            (
                entry.pass_text,
                entry.claim,
                entry.outcome.value,
                f"{entry.before.operations:,} -> {entry.after.operations:,}",
                format_size(entry.after.bytes),
                *([change] if losses else []),
            )
        )
    typer.echo(table(rows, numbers=frozenset({3, 4, 5})))
    if result.module.plan is not None:
        typer.echo(f"plan: {result.module.plan.description()}")
    typer.echo()
    rows = [("verified", "difference", "allowed", "ties", "tokens")]
    rows += [
        (row.comparison, f"{row.relative_difference:.1e}", f"{row.bound:.0e}", f"{row.ties}", f"{row.tokens}")
        for row in report.verification
    ]
    typer.echo(table(rows, numbers=frozenset({1, 2, 3, 4})) if report.verification else "not verified (--no-verify)")
    if time_passes:
        typer.echo()
        times = [("pass", "seconds", "ledger seconds")]
        times += [
            (item.pass_text, f"{item.seconds:.3f}", f"{item.ledger_seconds:.3f}") for item in result.measurements.passes
        ]
        typer.echo(table(times, numbers=frozenset({1, 2})))
    if explain:
        typer.echo()
        typer.echo(result.pipeline_report.explanation_text() or "no pass refused anything")
    for hint in result.hints:
        typer.echo()
        typer.echo(f"hint: {hint}")
    cost = result.measurements.actual
    ledger = sum(item.ledger_seconds for item in result.measurements.passes)
    typer.echo()
    typer.echo(
        f"wrote {output}: {format_size(cost.disk_bytes)} in {cost.seconds:.1f} s ({ledger:.1f} s of it for the "
        f"ledger), {format_size(cost.memory_bytes)} memory"
    )
