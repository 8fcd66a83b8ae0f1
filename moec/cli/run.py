"""`moec run`: generates text, or embeds it, with the exported artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moec.errors import UsageError


def run(
    artifact: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `moec compile -o` wrote.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text to continue; repeat it for a batch.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with one prompt per line.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add to each prompt.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample among the likeliest tokens only.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Makes sampling repeatable.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; all cores by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of text.")] = False,
) -> None:
    """Generates text with the artifact; prints embeddings if it is an encoder."""
    prompts = list(prompt or [])
    if prompt_file is not None:
        if not prompt_file.is_file():
            raise UsageError("there is no such prompt file", where=str(prompt_file))
        prompts += [line for line in prompt_file.read_text(encoding="utf-8").splitlines() if line]
    if not prompts:
        raise UsageError("there is no prompt", hint="give --prompt TEXT or --prompt-file FILE")

    from moec.artifact.generation import Sampling, embed, generate
    from moec.artifact.manifest import read_manifest
    from moec.artifact.runtime import OnnxModel
    from moec.artifact.text import TextCodec

    read_manifest(artifact)
    folder = artifact / "onnx"
    model = OnnxModel(folder / "model.onnx", threads=threads)
    codec = TextCodec(folder)
    tokens = [codec.encode_prompt(text) for text in prompts]
    if not model.is_decoder:
        vectors = embed(model, tokens).tolist()
        for text, vector in zip(prompts, vectors, strict=True):
            typer.echo(json.dumps({"prompt": text, "embedding": vector}))
        return
    sampling = Sampling(temperature, top_p, seed)
    results = generate(model, tokens, max_new_tokens, end_ids=codec.end_ids, sampling=sampling)
    if as_json:
        rows = [
            {"prompt": text, "tokens": ids, "text": codec.decode(ids)}
            for text, ids in zip(prompts, results, strict=True)
        ]
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    for position, (text, ids) in enumerate(zip(prompts, results, strict=True)):
        if position:
            typer.echo("----")
        typer.echo(text + codec.decode(ids))
