"""Runs an exported ONNX model in ONNX Runtime: decoders through their key/value cache, encoders in one call."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from moec.codegen.onnx.session_file import read_session_file
from moec.errors import UsageError, VerificationError

Cache = dict[str, Any]
"""Past keys and values by the name of the model's input; the values stay inside ONNX Runtime."""

_PAST = re.compile(r"^past_key_values\.(\d+)\.(key|value)$")
_ELEMENT_TYPES: dict[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class CacheInput:
    """One input for past keys or values: its element type and shape [batch, heads, past, size]."""

    name: str
    output: str
    dtype: type[np.generic]
    heads: int
    size: int


class OnnxModel:
    """An exported model. `is_decoder` says whether it gives logits and takes a cache."""

    def __init__(self, path: Path, *, threads: int | None = None, lean: bool = False) -> None:
        """Loads `path` (model.onnx) for the CPU. Raises UsageError if there is no such file.

        `lean` leaves the weights in their mapped file: no repacked copies and no folded constants, so that a model
        larger than the memory can be checked. It is slower. What `session.json` beside the model asks for is done.
        """
        if not path.is_file():
            raise UsageError("there is no ONNX model", where=str(path), hint="compile with --emit onnx")
        facts = read_session_file(path.parent)
        if facts.prepacked and not lean:
            path = path.parent / facts.prepacked
        options = onnxruntime.SessionOptions()
        for key, value in facts.options.items():
            options.add_session_config_entry(key, value)
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        if lean:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has a dozen exception classes without a common base
            raise VerificationError(
                f"ONNX Runtime {onnxruntime.__version__} does not load the model: {error}",
                where=str(path),
                hint="`moec verify` says what is wrong with it; or compile for this version of ONNX Runtime",
            ) from error
        inputs = {item.name: item for item in self.session.get_inputs()}
        self.outputs = [item.name for item in self.session.get_outputs()]
        self.inputs = frozenset(inputs)
        self.is_decoder = "logits" in self.outputs
        self._caches = tuple(
            CacheInput(
                name=name,
                output=f"present.{found.group(1)}.{found.group(2)}",
                dtype=_ELEMENT_TYPES[item.type],
                heads=int(item.shape[1]),
                size=int(item.shape[3]),
            )
            for name, item in inputs.items()
            if (found := _PAST.match(name))
        )

    @property
    def has_cache(self) -> bool:
        """Whether the model takes past keys and values; one that does not sees only what it is fed at once."""
        return bool(self._caches)

    def empty_cache(self, batch: int) -> Cache:
        """A cache that holds no tokens yet, for `batch` sequences."""
        return {
            cache.name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros((batch, cache.heads, 0, cache.size), cache.dtype)
            )
            for cache in self._caches
        }

    def step(self, ids: NDArray[np.int64], mask: NDArray[np.int64], cache: Cache) -> tuple[NDArray[np.float32], Cache]:
        """Feeds `ids` [batch, seq] behind what `cache` holds; `mask` [batch, past + seq] is 0 on padding.

        Returns logits float32 [batch, seq, vocabulary] and the longer cache.
        """
        feed = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in self._tokens(ids, mask).items()
        }
        names = ["logits", *(item.output for item in self._caches)]
        results = self.session.run_with_ort_values(names, {**feed, **cache})
        logits = np.asarray(results[0].numpy(), np.float32)
        return logits, {item.name: value for item, value in zip(self._caches, results[1:], strict=True)}

    def encode(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """The last hidden state float32 [batch, seq, hidden] of an encoder."""
        feed = self._tokens(ids, mask)
        if "token_type_ids" in self.inputs:
            feed["token_type_ids"] = np.zeros_like(ids)
        return np.asarray(self.session.run(["last_hidden_state"], feed)[0], np.float32)

    def _tokens(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        feed = {"input_ids": np.ascontiguousarray(ids)}
        if "attention_mask" in self.inputs:
            feed["attention_mask"] = np.ascontiguousarray(mask)
        if "position_ids" in self.inputs:
            feed["position_ids"] = np.ascontiguousarray(positions(mask)[:, -ids.shape[1] :])
        return feed


def positions(mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of each token among the tokens that are not padding, 0 on padding; the shape of `mask` [batch, seq]."""
    return cast("NDArray[np.int64]", np.maximum(np.cumsum(mask, axis=1) - 1, 0))
