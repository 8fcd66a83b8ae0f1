"""`moec bench`: how fast an artifact is, and how far from the limits of the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moec.cli.common import ArtifactArgument, JsonOption, table


def bench(
    artifact: ArtifactArgument,
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    decode: Annotated[int, typer.Option(min=1, help="Tokens to decode in each round.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every subject.")] = 1,
    seed: Annotated[int, typer.Option(help="Decides the tokens.")] = 0,
    beside: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Another ONNX export of the source to measure too.")
    ] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Do not measure the source in transformers.")] = False,
    against: Annotated[Path | None, typer.Option(metavar="SOURCE", help="The source, if it has moved.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measures prefill and decode speed beside transformers, memory bandwidth and matrix product speed.

    Kernels (--emit triton) are measured where there is a GPU, in the source beside torch's grouped_mm.
    """
    from moec.artifact.opened import Artifact
    from moec.artifact.options import Backend
    from moec.artifact.speed import BenchSettings, bench_folder, kernel_device
    from moec.cli.progress import progress

    settings = BenchSettings(prefill, decode, rounds, threads, seed)
    with progress() as show:
        show("measuring")
        rows = bench_folder(artifact, settings, against=against, beside=beside or [], alone=alone)
    if as_json:
        typer.echo(json.dumps([row.model_dump() for row in rows], indent=2))
        return
    lines = [("task", "subject", "tokens/s", "bound", "of the bound")]
    for row in rows:
        bound = row.bound_tokens_per_second
        share = f"{row.tokens_per_second / bound:.0%}" if bound else ""
        lines.append((row.task, row.subject, f"{row.tokens_per_second:,.0f}", f"{bound:,.0f}" if bound else "", share))
    typer.echo(table(lines, numbers=frozenset({2, 3, 4})))
    if Artifact.open(artifact).has(Backend.TRITON) and not kernel_device():
        typer.echo("the kernels were not measured: there is no GPU")
