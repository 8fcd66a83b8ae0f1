"""`moec eval`: how well a model or an artifact predicts a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moec.cli.common import JsonOption, StoreOption, ThreadsOption, table

if TYPE_CHECKING:
    from moec.artifact.measurements import Comparison


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="SOURCE|OUT", help="Model folder or artifact.")],
    text: Annotated[list[Path], typer.Option("--text", help="Text file; repeat it for several.")],
    window: Annotated[int, typer.Option(min=2, help="Tokens per window; windows do not overlap.")] = 256,
    tokens: Annotated[int, typer.Option(min=0, help="Score only so many tokens of each text; 0: all.")] = 0,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens that an artifact is fed in one call.")] = 64,
    compare: Annotated[bool, typer.Option("--compare", help="For an artifact: against its source.")] = False,
    against: Annotated[Path | None, typer.Option(metavar="SOURCE", help="The source, if it has moved.")] = None,
    store: StoreOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measures nats per token and per byte of text, through the key/value cache for an artifact.

    With --compare also how often each router chooses the experts that the source chooses, how far each expert is off,
    and bits per weight counted in the files.
    """
    from moec.artifact.evaluation import evaluate_artifact, evaluate_source
    from moec.artifact.folder import MANIFEST_NAME
    from moec.artifact.loss import LossSettings

    settings = LossSettings(window=window, limit=tokens, chunk=chunk)
    comparison = None
    if (folder / MANIFEST_NAME).is_file():
        found = evaluate_artifact(
            folder, text, settings, compare=compare, against=against, store=store, threads=threads
        )
        rows, comparison = list(found.losses), found.comparison
    else:
        rows = evaluate_source(folder, text, settings)
    if as_json:
        losses = [row.model_dump() for row in rows]
        plain = losses[0] if len(losses) == 1 else losses
        whole = plain if comparison is None else {"losses": losses, **comparison.model_dump()}
        typer.echo(json.dumps(whole, indent=2))
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
    if comparison is not None:
        _show(comparison)


def _show(comparison: Comparison) -> None:
    lines = [("layer", "experts agree", "all the same", "error of its experts")]
    for row in comparison.routers:
        if row.agreement is None or row.same is None:
            lines.append((row.layer, "-", "-", row.note))
            continue
        errors = [error for expert in row.experts if (error := expert.relative_error) is not None]
        low = [error for expert in row.experts if (error := expert.low_replica_error) is not None]
        words = f"{min(errors):.2%} to {max(errors):.2%}" if errors else "no tokens"
        words += f", low replicas {min(low):.2%} to {max(low):.2%}" if low else ""
        lines.append((row.layer, f"{row.agreement:.1%}", f"{row.same:.1%}", words))
    if comparison.routers:
        typer.echo("")
        typer.echo(table(lines, numbers=frozenset({1, 2})))
    stored = comparison.stored
    words = f"{stored.bits_per_weight:.3f} bits for each weight of the source, counted in the files"
    if stored.expert_bits_per_weight is not None:
        words += f"; experts {stored.expert_bits_per_weight:.3f}"
    typer.echo(f"\n{words}")
