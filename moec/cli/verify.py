"""`moec verify`: checks an artifact against its IR and its source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moec.cli.common import ArtifactArgument, JsonOption, OthersOption, PluginsOption, StoreOption, load_plugins, table
from moec.errors import UsageError


def verify(
    artifact: ArtifactArgument,
    against: Annotated[
        Path | None, typer.Option(metavar="SOURCE", help="The source, if it has moved since compilation.")
    ] = None,
    others: OthersOption = None,
    text: Annotated[Path | None, typer.Option(help="Text to compare on, instead of a built-in passage.")] = None,
    store: StoreOption = None,
    files_only: Annotated[
        bool, typer.Option("--files-only", help="Check digests alone; needs neither the source nor its weights.")
    ] = False,
    plugins: PluginsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Checks digests, then artifact against IR against source on real tokens; a router tie is not an error."""
    import json

    from moec.artifact.recheck import verify_files, verify_folder
    from moec.cli.progress import progress

    if files_only and (against is not None or text is not None or store is not None):
        raise UsageError("--files-only reads the artifact alone", hint="leave out --against, --text and --store")
    load_plugins(plugins)
    if files_only:
        count = verify_files(artifact)
        if as_json:
            typer.echo(json.dumps({"files": count, "comparisons": []}))
        else:
            typer.echo(f"{count} files are as the manifest lists them")
            typer.echo("not compared: artifact, IR and source on tokens (--files-only)")
        return
    with progress() as show:
        rows = verify_folder(artifact, against=against, others=others or (), text=text, store=store, progress=show)
    if as_json:
        typer.echo(json.dumps([row.model_dump() for row in rows], indent=2))
        return
    lines = [("verified", "difference", "allowed", "ties", "tokens")]
    lines += [
        (row.comparison, f"{row.relative_difference:.1e}", f"{row.bound:.0e}", f"{row.ties}", f"{row.tokens}")
        for row in rows
    ]
    typer.echo(table(lines, numbers=frozenset({1, 2, 3, 4})))
