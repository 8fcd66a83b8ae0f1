"""`moec passes`: what passes and recipes there are, with their options and statistics."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from moec.errors import UsageError


def passes(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Show this pass or recipe only, in full.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/passes.md.")] = False,
) -> None:
    """Lists passes and recipes, or shows the options and statistics of one pass or the pipeline of one recipe."""
    from moec.pipeline.catalogue import as_dictionary, describe, describe_all, list_text, markdown_page, text_of
    from moec.pipeline.recipes import recipe_dictionary, recipe_list_text, recipe_text, recipes

    if as_json and markdown:
        raise UsageError("--json and --markdown exclude each other")
    if name:
        found = [recipe for recipe in recipes() if recipe.name == name]
        if found:
            shown = [recipe_dictionary(recipe) for recipe in found]
            texts = "\n\n".join(map(recipe_text, found))
            typer.echo(json.dumps(shown, indent=2) if as_json else texts)
            return
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
        typer.echo("\nRecipes, for `moec compile --recipe`, and the models that they are for:\n")
        typer.echo(recipe_list_text(recipes()))
    for problem in problems:
        typer.echo(f"moec: note: {problem}", err=True)
