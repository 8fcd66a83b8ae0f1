"""Losses on text: how well a model predicts each next token, through the key/value cache or in one pass.

The text is one stream of tokens without special ones, cut into windows that do not overlap. In a window of `window`
inputs every token predicts the one behind it, so each token of the stream but the first is scored once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moec.artifact.measurements import LossRow
from moec.artifact.runtime import OnnxModel
from moec.artifact.text import TokenizedText
from moec.artifact.tokens import TokenBatch
from moec.errors import UsageError

Scorer = Callable[[NDArray[np.int64], NDArray[np.int64]], float]
"""Maps inputs and targets, int64 [windows, window], to the sum of the losses in nats."""

_ROWS = 64


@dataclass(frozen=True)
class LossSettings:
    """Lengths in tokens. `limit` scores only the first tokens of the text, 0 all; `chunk` are fed in one call."""

    window: int = 256
    limit: int = 0
    chunk: int = 64
    batch: int = 8


def measure_loss(text: TokenizedText, subject: str, score: Scorer, settings: LossSettings) -> LossRow:
    """Mean loss of `subject` on `text`. Raises UsageError if the text is shorter than one window."""
    count = (len(text.ids) - 1) // settings.window
    if settings.limit:
        count = min(count, max(settings.limit // settings.window, 1))
    if count < 1:
        raise UsageError(
            f"the text has {len(text.ids)} tokens, fewer than one window of {settings.window} and its targets",
            where=text.name,
            hint="give a longer text or a smaller --window",
        )
    used = count * settings.window
    inputs = text.ids[:used].reshape(count, settings.window)
    targets = text.ids[1 : used + 1].reshape(count, settings.window)
    total = sum(
        score(inputs[row : row + settings.batch], targets[row : row + settings.batch])
        for row in range(0, count, settings.batch)
    )
    return LossRow(
        subject=subject,
        text=text.name,
        tokens=used,
        nats_per_token=total / used,
        nats_per_byte=total / max(text.bytes_of(1, used + 1), 1),
    )


def artifact_scorer(model: OnnxModel, settings: LossSettings) -> Scorer:
    """Scores with an exported decoder, feeding `settings.chunk` tokens at a time through its cache, if it has one."""

    def score(inputs: NDArray[np.int64], targets: NDArray[np.int64]) -> float:
        cache = model.empty_cache(len(inputs))
        total = 0.0
        for start, stop in pieces(inputs.shape[1], settings.chunk if model.has_cache else inputs.shape[1]):
            mask = np.ones((len(inputs), stop), np.int64)
            logits, cache = model.step(inputs[:, start:stop], mask, cache)
            total += cross_entropy(logits, targets[:, start:stop])
        return total

    return score


def pieces(length: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Start and stop of consecutive pieces of at most `chunk` that cover `length`."""
    for start in range(0, length, chunk):
        yield start, min(start + chunk, length)


def batch_loss(logits: NDArray[np.floating], batch: TokenBatch) -> float:
    """Nats per token of logits [rows, length, vocabulary], each token predicted from those before it, padding apart."""
    kept = (batch.mask[:, 1:] * batch.mask[:, :-1]).astype(bool)
    return cross_entropy(logits[:, :-1][kept], batch.ids[:, 1:][kept]) / max(int(kept.sum()), 1)


def cross_entropy(logits: NDArray[np.floating], targets: NDArray[np.int64]) -> float:
    """Sum of -log softmax(logits)[target] in nats, float64; logits [..., vocabulary], targets [...]."""
    flat_logits, flat_targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    total = 0.0
    for start, stop in pieces(len(flat_targets), _ROWS):
        rows = flat_logits[start:stop].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        chosen = rows[np.arange(len(rows)), flat_targets[start:stop]]
        total += float((np.log(np.exp(rows).sum(axis=1)) - chosen).sum())
    return total
