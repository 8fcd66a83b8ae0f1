"""`moec kernels`: what the generated kernels of an artifact take on each GPU architecture, without a GPU."""

from __future__ import annotations

from typing import Annotated

import typer

from moec.cli.common import ArtifactArgument, JsonOption, table
from moec.errors import UsageError


def kernels(
    artifact: ArtifactArgument,
    architectures: Annotated[
        str, typer.Option("--architectures", metavar="sm90,gfx942", help="Which to compile for; all without it.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Compiles the kernels for GPU architectures: registers, spills, shared memory, instructions, predicted bound."""
    import json

    from moec.artifact.opened import Artifact
    from moec.artifact.options import Backend
    from moec.cli.progress import progress
    from moec.codegen.triton.ahead import Package
    from moec.codegen.triton.architectures import parse_architectures
    from moec.codegen.triton.kernel_report import report_kernels
    from moec.codegen.triton.rendering import PACKAGE_NAME

    wanted = parse_architectures(architectures)
    opened = Artifact.open(artifact)
    if not opened.has(Backend.TRITON):
        raise UsageError("the artifact holds no kernels", where=str(artifact), hint="compile it with --emit triton")
    with progress() as show:
        package = Package.open(opened.kernels / PACKAGE_NAME)
        rows = list(report_kernels(package, wanted, show))
    if as_json:
        typer.echo(json.dumps([row.as_json() for row in rows], indent=2))
        return
    lines = [
        (
            "architecture", "kernel", "rows", "tile", "from", "registers", "spills", "shared", "occupancy",
            "per weight", "predicted bound", "issue",
        )
    ]  # fmt: skip
    for row in rows:
        prediction = row.prediction
        lines.append(
            (
                row.architecture,
                f"{row.kind} {row.kernel}".strip(),
                row.phase,
                row.tile,
                row.origin,
                f"{row.metrics.registers}",
                f"{row.metrics.spills}",
                f"{row.metrics.shared_bytes / 1024:.0f} KiB",
                f"{row.metrics.occupancy:.0%}",
                "" if row.instructions is None else f"{row.instructions:.2f}",
                "" if prediction is None else f"{prediction.bound.value} on {prediction.gpu}",
                "" if prediction is None else f"{prediction.issue:.0%}",
            )
        )
    typer.echo(table(lines, numbers=frozenset({5, 6, 7, 8, 9, 11})))
    typer.echo()
    typer.echo(
        "Compiled, not run: `per weight` counts instructions of a thread in the loop of the binary, and `issue` is the "
        "time to issue them over that of memory and products at the data sheet's speed. Tiles are from the shipped "
        "table of the architecture, or by rule where it does not list the shape."
    )
