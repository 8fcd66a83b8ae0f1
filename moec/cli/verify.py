"""`moec verify`: checks an artifact against its IR and its source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moec.cli.common import ArtifactArgument, JsonOption, StoreOption, table


def verify(
    artifact: ArtifactArgument,
    against: Annotated[
        Path | None, typer.Option(metavar="SOURCE", help="The source, if it has moved since compilation.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text to compare on, instead of a built-in passage.")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Checks digests, then artifact against IR against source on real tokens; a router tie is not an error."""
    import json

    from moec.artifact.recheck import verify_folder
    from moec.cli.progress import progress

    with progress() as show:
        rows = verify_folder(artifact, against=against, text=text, store=store, progress=show)
    if as_json:
        typer.echo(json.dumps([row.model_dump() for row in rows], indent=2))
        return
    lines = [("verified", "difference", "allowed", "ties", "tokens")]
    lines += [
        (row.comparison, f"{row.relative_difference:.1e}", f"{row.bound:.0e}", f"{row.ties}", f"{row.tokens}")
        for row in rows
    ]
    typer.echo(table(lines, numbers=frozenset({1, 2, 3, 4})))
