"""`moec passes`: what passes there are, with their options and statistics."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from moec.errors import UsageError


def passes(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Show this pass only, in full.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/passes.md.")] = False,
) -> None:
    """Lists the passes, or shows the options and statistics of one."""
    from moec.pipeline.catalogue import as_dictionary, describe, describe_all, list_text, markdown_page, text_of

    if as_json and markdown:
        raise UsageError("--json and --markdown exclude each other")
    if name:
        description = describe(name)
        typer.echo(json.dumps(as_dictionary(description), indent=2) if as_json else text_of(description))
        return
    descriptions, problems = describe_all(builtin_only=markdown)
    if as_json:
        typer.echo(json.dumps([as_dictionary(description) for description in descriptions], indent=2))
    elif markdown:
        typer.echo(markdown_page(descriptions), nl=False)
    else:
        typer.echo(list_text(descriptions))
    for problem in problems:
        typer.echo(f"moec: note: {problem}", err=True)
