"""Text from an exported decoder, and embeddings from an exported encoder, for a batch of prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moec.artifact.runtime import OnnxModel
from moec.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 takes the most likely one; `top_p` keeps the likeliest tokens
    whose probabilities reach it (Holtzman et al. 2020)."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def generate(
    model: OnnxModel,
    prompts: Sequence[Sequence[int]],
    limit: int,
    *,
    end_ids: frozenset[int] = frozenset(),
    sampling: Sampling = Sampling(),
) -> list[list[int]]:
    """At most `limit` new tokens for each prompt; a sequence stops in front of a token of `end_ids`.

    Prompts of different lengths are padded on the left. Raises UsageError for an empty prompt or an encoder.
    """
    if not model.is_decoder:
        raise UsageError("this model is an encoder: it has no next token", hint="give prompts to get embeddings")
    ids, mask = pad_left(prompts)
    random = np.random.default_rng(sampling.seed)
    results: list[list[int]] = [[] for _ in prompts]
    open_rows = np.ones(len(prompts), bool)
    cache = model.empty_cache(len(prompts))
    for _ in range(limit):
        logits, cache = model.step(ids, mask, cache)
        chosen = choose(logits[:, -1], sampling, random)
        open_rows &= ~np.isin(chosen, list(end_ids))
        if not open_rows.any():
            break
        for row in np.flatnonzero(open_rows):
            results[row].append(int(chosen[row]))
        ids = chosen[:, None]
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
    return results


def choose(logits: NDArray[np.float32], sampling: Sampling, random: np.random.Generator) -> NDArray[np.int64]:
    """The next token int64 [batch] of each row of `logits` [batch, vocabulary]; ties go to the lower id."""
    if sampling.temperature == 0:
        return np.asarray(np.argmax(logits, axis=1), np.int64)
    scaled = logits.astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    chosen = np.empty(len(logits), np.int64)
    for row, distribution in enumerate(probabilities):
        order = np.argsort(-distribution, kind="stable")
        cumulative = np.cumsum(distribution[order])
        kept = int(np.searchsorted(cumulative, sampling.top_p)) + 1
        cut = cumulative[min(kept, len(order)) - 1] * random.random()
        chosen[row] = order[np.searchsorted(cumulative, cut, side="right")]
    return chosen


def embed(model: OnnxModel, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """One unit vector float32 [prompts, hidden] per prompt: the mean of its last hidden states."""
    ids, mask = pad_right(prompts)
    hidden = model.encode(ids, mask)
    mean = (hidden * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
    return np.asarray(mean / np.linalg.norm(mean, axis=1, keepdims=True), np.float32)


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and mask, int64 [prompts, longest], with padding (id 0, mask 0) in front."""
    ids, mask = _empty(prompts)
    for row, prompt in enumerate(prompts):
        ids[row, ids.shape[1] - len(prompt) :] = prompt
        mask[row, ids.shape[1] - len(prompt) :] = 1
    return ids, mask


def pad_right(prompts: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and mask, int64 [prompts, longest], with padding (id 0, mask 0) behind."""
    ids, mask = _empty(prompts)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
        mask[row, : len(prompt)] = 1
    return ids, mask


def _empty(prompts: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if not prompts or not all(prompts):
        raise UsageError("a prompt has no tokens", hint="give a text that is not empty")
    shape = (len(prompts), max(len(prompt) for prompt in prompts))
    return np.zeros(shape, np.int64), np.zeros(shape, np.int64)
