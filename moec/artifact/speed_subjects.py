"""What `moec bench` measures: exported decoders, their source in transformers, the source with generated kernels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from moec.artifact.runtime import OnnxModel
from moec.codegen.triton.running import import_package, require_triton
from moec.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tokens = NDArray[np.int64]
ARTIFACT = "artifact (ONNX Runtime)"
KERNELS = "source with the artifact's kernels"


class Subject(Protocol):
    """Something that reads a prompt and then decodes given tokens one by one."""

    name: str

    def prefill(self, prompt: Tokens) -> None:
        """Feeds `prompt` [1, n] and keeps the cache."""

    def decode(self, token: Tokens) -> None:
        """Feeds one more token [1, 1]."""


class OnnxSubject:
    """An exported decoder in ONNX Runtime. One without a cache is fed the whole sequence again for each token."""

    def __init__(self, name: str, path: Path, threads: int) -> None:
        self.name = name
        self._model = OnnxModel(path, threads=threads)
        if not self._model.is_decoder:
            raise UsageError("only decoders can be measured", where=str(path))
        self._cache: dict[str, Any] = {}
        self._seen = np.zeros((1, 0), np.int64)

    def prefill(self, prompt: Tokens) -> None:
        self._seen = prompt
        _, self._cache = self._model.step(prompt, np.ones_like(prompt), self._model.empty_cache(1))

    def decode(self, token: Tokens) -> None:
        self._seen = np.concatenate([self._seen, token], axis=1)
        fed = token if self._model.has_cache else self._seen
        _, self._cache = self._model.step(fed, np.ones_like(self._seen), self._cache)


class TransformersSubject:
    """A model in transformers, with one of its implementations of experts where one is named."""

    def __init__(self, name: str, model: PreTrainedModel, experts: str = "") -> None:
        self.name = name
        self._model: Any = model
        self._experts = experts
        self._past: Any = None

    def prefill(self, prompt: Tokens) -> None:
        if self._experts:
            self._model.set_experts_implementation(self._experts)
        self._past = None
        self.decode(prompt)

    def decode(self, token: Tokens) -> None:
        ids = torch.from_numpy(token).to(self._model.device)
        with torch.no_grad():
            output = self._model(input_ids=ids, past_key_values=self._past, use_cache=True)
        self._past = output.past_key_values
        if ids.is_cuda:
            torch.cuda.synchronize()


def transformers_subjects(source: Path, has_experts: bool) -> list[Subject]:
    """The source in float32, with both implementations of experts where it has any."""
    model = _load(source, torch.float32)
    if not has_experts:
        return [TransformersSubject("transformers", model)]
    return [TransformersSubject(f"transformers ({name})", model, name) for name in ("eager", "grouped_mm")]


def kernel_subjects(source: Path, package: Path, dtype: torch.dtype, device: str) -> list[Subject]:
    """The source on a device with its layers of experts replaced by those of a package, and with torch's grouped_mm.

    Everything else is the source's in both. Raises UsageError without triton.
    """
    require_triton("timing its kernels")
    plain, replaced = (_load(source, dtype).to(device) for _ in range(2))
    import_package(package).replace_blocks(replaced)
    return [
        TransformersSubject(KERNELS, replaced),
        TransformersSubject("transformers (grouped_mm)", plain, "grouped_mm"),
    ]


def _load(source: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
    ).eval()
