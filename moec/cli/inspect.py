"""`moec inspect`: what is in a model or an artifact, layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moec.cli.common import CalibrationOption, JsonOption, table
from moec.errors import UsageError

if TYPE_CHECKING:
    from moec.artifact.report import LayerFacts

# more experts than this are listed only on request
_LISTED_EXPERTS = 64


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="SOURCE|OUT", help="Model folder or artifact.")],
    experts: Annotated[
        bool | None, typer.Option("--experts/--no-experts", help="List every expert; by default up to 64.")
    ] = None,
    calibration: CalibrationOption = None,
    as_json: JsonOption = False,
) -> None:
    """Shows layers, experts, routing and sizes of a model folder or an artifact.

    How often experts are chosen is known of artifacts whose passes were calibrated, and of a model folder with
    --calibration.
    """
    from moec.artifact.folder import MANIFEST_NAME

    if (folder / MANIFEST_NAME).is_file():
        if calibration is not None:
            raise UsageError(
                "an artifact is not calibrated again", where=str(folder), hint="inspect its source with --calibration"
            )
        _inspect_artifact(folder, experts, as_json)
    else:
        _inspect_source(folder, experts, calibration, as_json)


def _inspect_artifact(folder: Path, experts: bool | None, as_json: bool) -> None:
    from moec.artifact.manifest import read_manifest
    from moec.artifact.report import read_report

    manifest, report = read_manifest(folder), read_report(folder)
    if as_json:
        facts = report.model_dump(mode="json")
        facts["manifest"] = manifest.model_dump(mode="json", by_alias=True)
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    typer.echo(f"artifact of {report.title}: {report.architecture} for {report.target}, {report.dtype}")
    typer.echo(f"pipeline: {report.pipeline or '(no passes)'}")
    typer.echo(_sizes(report.parameters, report.active_parameters, report.active_flops))
    _print_layers(report.layers, experts)


def _inspect_source(folder: Path, experts: bool | None, calibration: Path | None, as_json: bool) -> None:
    from moec.artifact.options import RAISING_PIPELINE
    from moec.artifact.summary import active_parameters, layer_facts, model_size
    from moec.frontend.huggingface import load_huggingface
    from moec.pipeline.manager import PassManager, Pipeline

    module = load_huggingface(folder)
    pipeline = RAISING_PIPELINE if calibration is None else f"{RAISING_PIPELINE},calibrate"
    manager = PassManager(Pipeline.parse(pipeline))
    manager.run(module.op, weights=module.weights, module=module, calibration_file=calibration)
    layers, size, active = layer_facts(module), model_size(module), active_parameters(module)
    source = module.source
    if as_json:
        facts = {
            "architecture": source.class_name,
            "model_type": source.model_type,
            "kind": source.kind,
            "parameters": size.parameters,
            "active_parameters": active,
            "active_flops": size.active_flops,
            "bytes": size.bytes,
            "tensors": source.tensors_total,
            "tensors_unused": source.tensors_unused,
            "layers": [layer.model_dump() for layer in layers],
        }
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    typer.echo(f"{source.class_name} ({source.model_type}), {source.kind}")
    typer.echo(_sizes(size.parameters, active, size.active_flops))
    typer.echo(f"{source.tensors_used} of {source.tensors_total} checkpoint tensors used")
    for name, reason in source.tensors_unused.items():
        typer.echo(f"  {name}: {reason}")
    _print_layers(layers, experts)


def _print_layers(layers: tuple[LayerFacts, ...], experts: bool | None) -> None:
    typer.echo()
    typer.echo(_layer_table(layers))
    count = sum(len(group.experts) for layer in layers for group in layer.classes)
    if count and (experts or (experts is None and count <= _LISTED_EXPERTS)):
        typer.echo()
        typer.echo(_expert_table(layers))


def _sizes(parameters: int, active: int, flops: int) -> str:
    return f"{parameters:,} parameters, {active:,} active and {flops:,} FLOPs per token"


def _layer_table(layers: tuple[LayerFacts, ...]) -> str:
    from moec.artifact.expert_rows import describe_experts, describe_widths
    from moec.artifact.report import format_size, layer_runs

    rows = [("layer", "kind", "experts", "width", "outputs", "top-k", "bytes", "routing")]
    for name, layer in layer_runs(layers):
        outputs, top_k = (str(number) if number else "" for number in (layer.router_outputs, layer.top_k))
        size = format_size(layer.total_bytes)
        widths = describe_widths(layer)
        rows.append((name, layer.kind, describe_experts(layer), widths, outputs, top_k, size, layer.routing))
    return table(rows, numbers=frozenset({4, 5, 6}))


def _expert_table(layers: tuple[LayerFacts, ...]) -> str:
    """One line per stored expert; what is the same everywhere has no column."""
    from moec.artifact.expert_rows import expert_rows
    from moec.artifact.report import format_size

    rows = [("layer", "expert", "kind", "width", "rank", "outputs", "bytes", "tokens", "gate mass", "")]
    for layer in layers:
        for number, row in enumerate(expert_rows(layer)):
            rows.append(
                (
                    layer.name if number == 0 else "",
                    str(row.number),
                    row.body,
                    str(row.width or ""),
                    str(row.rank or ""),
                    ", ".join(map(str, row.outputs)) or "none",
                    format_size(row.bytes),
                    "" if row.chosen is None else f"{row.chosen:.1%}",
                    "" if row.gate_mass is None else f"{row.gate_mass:.1%}",
                    "protected" if row.protected else "",
                )
            )
    used = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    kept = [tuple(row[column] for column in used) for row in rows]
    return table(kept, numbers=frozenset(used.index(column) for column in (1, 3, 4, 6, 7, 8) if column in used))
