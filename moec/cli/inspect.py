"""`moec inspect`: what is in a model or an artifact, layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moec.cli.common import JsonOption, table

if TYPE_CHECKING:
    from moec.artifact.report import LayerFacts


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="SOURCE|OUT", help="Model folder or artifact.")],
    as_json: JsonOption = False,
) -> None:
    """Shows layers, experts, routing and sizes of a model folder or an artifact."""
    from moec.artifact.folder import MANIFEST_NAME

    if (folder / MANIFEST_NAME).is_file():
        _inspect_artifact(folder, as_json)
    else:
        _inspect_source(folder, as_json)


def _inspect_artifact(folder: Path, as_json: bool) -> None:
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
    typer.echo()
    typer.echo(_layer_table(report.layers))


def _inspect_source(folder: Path, as_json: bool) -> None:
    from moec.artifact.options import RAISING_PIPELINE
    from moec.artifact.summary import active_parameters, layer_facts, model_size
    from moec.frontend.huggingface import load_huggingface
    from moec.pipeline.manager import PassManager, Pipeline

    module = load_huggingface(folder)
    manager = PassManager(Pipeline.parse(RAISING_PIPELINE))
    manager.run(module.op, weights=module.weights, module=module)
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
    typer.echo()
    typer.echo(_layer_table(layers))


def _sizes(parameters: int, active: int, flops: int) -> str:
    return f"{parameters:,} parameters, {active:,} active and {flops:,} FLOPs per token"


def _layer_table(layers: tuple[LayerFacts, ...]) -> str:
    from moec.artifact.report import format_size, layer_runs

    rows = [("layer", "kind", "experts", "width", "top-k", "bytes", "routing")]
    for name, layer in layer_runs(layers):
        experts = " + ".join(f"{len(group.experts)} {group.body}" for group in layer.classes)
        width = " + ".join(f"{group.width}" for group in layer.classes)
        top_k = str(layer.top_k) if layer.top_k else ""
        rows.append((name, layer.kind, experts, width, top_k, format_size(layer.total_bytes), layer.routing))
    return table(rows, numbers=frozenset({4, 5}))
