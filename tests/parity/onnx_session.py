"""Runs an exported model in plain onnxruntime, by the names that Optimum uses; nothing of moec is involved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


@dataclass
class OnnxSession:
    """A loaded model; `cache_shapes` gives [heads, size] of each past input."""

    session: onnxruntime.InferenceSession
    inputs: frozenset[str]
    cache_shapes: dict[str, tuple[int, int]]

    @staticmethod
    def load(path: Path) -> OnnxSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        caches = {
            item.name: (int(item.shape[1]), int(item.shape[3]))
            for item in session.get_inputs()
            if item.name.startswith("past_key_values.")
        }
        return OnnxSession(session, frozenset(item.name for item in session.get_inputs()), caches)

    def empty_cache(self, batch: int) -> dict[str, Any]:
        return {
            name: np.zeros((batch, heads, 0, size), np.float32) for name, (heads, size) in self.cache_shapes.items()
        }

    def step(self, ids: Ids, mask: Ids, cache: dict[str, Any]) -> tuple[Logits, dict[str, Any]]:
        """Logits of `ids` [batch, seq] behind the cache, and the longer cache; `mask` [batch, past + seq]."""
        feed: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
        feed["position_ids"] = feed["position_ids"][:, -ids.shape[1] :]
        feed = {name: value for name, value in feed.items() if name in self.inputs} | cache
        names = ["logits", *(name.replace("past_key_values", "present") for name in cache)]
        logits, *present = self.session.run(names, feed)
        return logits, dict(zip(cache, present, strict=True))

    def prefill(self, ids: Ids, mask: Ids) -> Logits:
        """Logits [batch, seq, vocabulary] of whole sequences."""
        return self.step(ids, mask, self.empty_cache(len(ids)))[0]

    def decode(self, ids: Ids, mask: Ids, first: int = 1) -> Logits:
        """The same, `first` tokens at once and then token by token through the cache."""
        logits, cache = self.step(ids[:, :first], mask[:, :first], self.empty_cache(len(ids)))
        parts = [logits]
        for end in range(first + 1, ids.shape[1] + 1):
            logits, cache = self.step(ids[:, end - 1 : end], mask[:, :end], cache)
            parts.append(logits)
        return np.concatenate(parts, axis=1)

    def encode(self, ids: Ids, mask: Ids, segments: Ids) -> Logits:
        """The last hidden state [batch, seq, hidden] of an encoder."""
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}
        feed = {name: value for name, value in feed.items() if name in self.inputs}
        return self.session.run(["last_hidden_state"], feed)[0]


def positions(mask: Ids) -> Ids:
    """Position of each token among those that are not padding, as generation numbers them; 0 on padding."""
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0)
