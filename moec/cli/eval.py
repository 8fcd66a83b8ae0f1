"""`moec eval`: how well a model or an artifact predicts a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moec.cli.common import JsonOption, ThreadsOption, table


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="SOURCE|OUT", help="Model folder or artifact.")],
    text: Annotated[list[Path], typer.Option("--text", help="Text file; repeat it for several.")],
    window: Annotated[int, typer.Option(min=2, help="Tokens per window; windows do not overlap.")] = 256,
    tokens: Annotated[int, typer.Option(min=0, help="Score only so many tokens of each text; 0: all.")] = 0,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens that an artifact is fed in one call.")] = 64,
    compare: Annotated[bool, typer.Option("--compare", help="For an artifact: score its source too.")] = False,
    against: Annotated[Path | None, typer.Option(metavar="SOURCE", help="The source, if it has moved.")] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measures nats per token and per byte of text, through the key/value cache for an artifact."""
    from moec.artifact.evaluation import evaluate_artifact, evaluate_source
    from moec.artifact.folder import MANIFEST_NAME
    from moec.artifact.loss import LossSettings

    settings = LossSettings(window=window, limit=tokens, chunk=chunk)
    if (folder / MANIFEST_NAME).is_file():
        rows = evaluate_artifact(folder, text, settings, compare=compare, against=against, threads=threads)
    else:
        rows = evaluate_source(folder, text, settings)
    if as_json:
        found = [row.model_dump() for row in rows]
        typer.echo(json.dumps(found[0] if len(found) == 1 else found, indent=2))
        return
    lines = [("text", "subject", "tokens", "nats per token", "perplexity", "nats per byte")]
    lines += [
        (
            row.text,
            row.subject,
            f"{row.tokens:,}",
            f"{row.nats_per_token:.4f}",
            f"{row.perplexity:.2f}",
            f"{row.nats_per_byte:.4f}",
        )
        for row in rows
    ]
    typer.echo(table(lines, numbers=frozenset({2, 3, 4, 5})))
