"""Routers from examples of what each expert is for (mergekit's way to mix models)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import yaml

from moec.artifact.text import TextCodec
from moec.artifact.tokens import TokenBatch, function_inputs
from moec.errors import UnsafeInputError, UsageError
from moec.experts import MoeLayer
from moec.reference.executor import Executor
from moec.reference.frame import Observation

if TYPE_CHECKING:
    from moec.module import Module

_MAX_BYTES = 16 << 20


class PromptMode(Enum):
    """What stands for a prompt."""

    HIDDEN = "hidden"  # what the router reads of its last token
    HIDDEN_AVERAGE = "hidden-avg"  # the mean of what the router reads of its tokens
    CHEAP_EMBED = "cheap-embed"  # the mean embedding of its tokens, in all layers


@dataclass(frozen=True)
class ExpertPrompts:
    """Texts that are for one expert, and texts that are not."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]


def read_prompts(path: Path, count: int) -> tuple[ExpertPrompts, ...]:
    """A YAML or JSON list with an entry for each expert: `positive`, and there may be `negative`, lists of texts.

    Raises UsageError for a missing file and for another number of entries, UnsafeInputError for a malformed one.
    """
    if not path.is_file():
        raise UsageError("there is no such file of prompts", where=str(path))
    if path.stat().st_size > _MAX_BYTES:
        raise UnsafeInputError(f"the file of prompts is larger than {_MAX_BYTES >> 20} MiB", where=str(path))
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UnsafeInputError(f"the prompts are no YAML: {error}", where=str(path)) from None
    hint = "write a list with an entry `positive: [...]` for each expert, and `negative: [...]` where there are some"
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise UnsafeInputError("the prompts are malformed", where=str(path), hint=hint)
    result = []
    for entry in found:
        positive, negative = entry.get("positive", []), entry.get("negative", [])
        lists = isinstance(positive, list) and isinstance(negative, list)
        if not lists or set(entry) - {"positive", "negative"} or not positive:
            raise UnsafeInputError("the prompts are malformed", where=str(path), hint=hint)
        if not all(isinstance(text, str) and text.strip() for text in [*positive, *negative]):
            raise UnsafeInputError("a prompt is no text", where=str(path), hint=hint)
        result.append(ExpertPrompts(tuple(positive), tuple(negative)))
    if len(result) != count:
        raise UsageError(f"there are prompts for {len(result)} experts, not {count}", where=str(path), hint=hint)
    return tuple(result)


def prompt_rows(
    module: Module,
    layers: Sequence[MoeLayer],
    prompts: Sequence[ExpertPrompts],
    mode: PromptMode,
    embedding: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Weight [E, F] of each layer's router by its name, float64, rows of length 1.

    A row is the mean of the expert's positive prompts less the mean of its negative ones. `embedding` [V, D] is for
    CHEAP_EMBED. Raises UsageError for a model without a tokenizer.
    """
    if module.source.folder is None:
        raise UsageError("the model has no folder with a tokenizer", hint="prompts are texts")
    codec = TextCodec(module.source.folder)
    executor = Executor(module.op, module.weights, keep_weights=True)
    signs = [(prompt.positive, 1.0) for prompt in prompts], [(prompt.negative, -1.0) for prompt in prompts]
    weights: dict[str, torch.Tensor] = {}
    for number in range(len(prompts)):
        for texts, sign in (signs[0][number], signs[1][number]):
            for text in texts:
                for name, row in _states(module, executor, layers, codec.encode_prompt(text), mode, embedding).items():
                    if name not in weights:
                        weights[name] = torch.zeros(len(prompts), len(row), dtype=torch.float64)
                    weights[name][number] += sign / len(texts) * row
    return {name: torch.nn.functional.normalize(weight, dim=1) for name, weight in weights.items()}


def _states(
    module: Module,
    executor: Executor,
    layers: Sequence[MoeLayer],
    ids: Sequence[int],
    mode: PromptMode,
    embedding: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """What stands for one prompt in each layer, float64 [F] by name."""
    if mode is PromptMode.CHEAP_EMBED:
        assert embedding is not None
        row = embedding[torch.tensor(ids)].double().mean(0)
        return {layer.name: row for layer in layers}
    found: dict[str, torch.Tensor] = {}
    names = {layer.router: layer.name for layer in layers}

    def watch(seen: Observation) -> None:
        if seen.op in names:
            rows = seen.operand(seen.op.operands[0]).double()  # the rows come first
            rows = rows.reshape(-1, rows.shape[-1])
            found[names[seen.op]] = rows[-1] if mode is PromptMode.HIDDEN else rows.mean(0)

    batch = TokenBatch(np.asarray([ids], np.int64), np.ones((1, len(ids)), np.int64))
    with torch.no_grad():
        executor.run(function_inputs(module.main, batch), observers=[watch])
    return found
