"""`moec bench`: prefill and decode speed of an artifact, beside transformers and the limits of the machine.

All subjects take turns in each round, on tokens that none has seen, and the median counts: the noise of a busy machine
meets them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from moec.artifact.machine_limits import MachineLimits, measure_limits
from moec.artifact.measurements import SpeedRow
from moec.artifact.opened import Artifact
from moec.artifact.options import OutputDType
from moec.artifact.report import Report, read_report, write_report
from moec.artifact.runtime import OnnxModel
from moec.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tokens = NDArray[np.int64]
ARTIFACT = "artifact (ONNX Runtime)"


@dataclass(frozen=True)
class BenchSettings:
    """Tokens of the prompt that is fed at once, tokens that are decoded behind it, and rounds; one sequence."""

    prefill: int = 512
    decode: int = 32
    rounds: int = 5
    threads: int = 1
    seed: int = 0


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
    """The source in transformers, with one of its implementations of experts."""

    def __init__(self, model: PreTrainedModel, experts: str) -> None:
        self.name = f"transformers ({experts})" if experts else "transformers"
        self._model: Any = model
        self._experts = experts
        self._past: Any = None

    def prefill(self, prompt: Tokens) -> None:
        if self._experts:
            self._model.set_experts_implementation(self._experts)
        self._past = None
        self.decode(prompt)

    def decode(self, token: Tokens) -> None:
        with torch.no_grad():
            output = self._model(input_ids=torch.from_numpy(token), past_key_values=self._past, use_cache=True)
        self._past = output.past_key_values


def bench_folder(
    folder: Path,
    settings: BenchSettings,
    *,
    against: Path | None = None,
    beside: Sequence[Path] = (),
    alone: bool = False,
) -> list[SpeedRow]:
    """Measures the artifact in `folder`, unless `alone` its source in transformers, and other exports `beside` it.

    The rows also go into the artifact's report. Raises UsageError for an encoder, or if the source is not there.
    """
    artifact = Artifact.open(folder)
    report = read_report(folder)
    subjects: list[Subject] = [OnnxSubject(ARTIFACT, artifact.onnx, settings.threads)]
    names = export_names(beside)
    subjects += [OnnxSubject(name, path, settings.threads) for name, path in zip(names, beside, strict=True)]
    if not alone:
        subjects += _transformers_subjects(
            artifact.source_folder(against), any(layer.classes for layer in report.layers)
        )
    settings = replace(settings, prefill=min(settings.prefill, _longest(artifact) - settings.decode))
    limits = measure_limits(_active_bytes(report), settings.threads)
    torch.set_num_threads(settings.threads)
    rows = _rows(_measure(subjects, settings, _vocabulary(artifact)), settings, report, limits)
    write_report(folder, report.model_copy(update={"speeds": tuple(rows)}))
    return rows


def export_names(paths: Sequence[Path]) -> list[str]:
    """What tells exports apart: the file with as many folders as are needed. Raises UsageError for equal paths."""
    parts = [path.absolute().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise UsageError("an export is named twice", hint="give each file to --beside once")
    length = 2
    while len({own[-length:] for own in parts}) < len(parts):
        length += 1
    return [f"export {Path(*own[-length:])}" for own in parts]


def _measure(subjects: Sequence[Subject], settings: BenchSettings, vocabulary: int) -> dict[str, tuple[float, float]]:
    """Median seconds of a prefill and of one decoded token, by subject."""
    random = np.random.default_rng(settings.seed)
    prefills: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    decodes: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    for round_index in range(settings.rounds + 1):
        prompt = random.integers(0, vocabulary, (1, settings.prefill))
        tokens = random.integers(0, vocabulary, (settings.decode, 1, 1))
        for subject in subjects:
            first = _seconds(subject.prefill, prompt)
            each = [_seconds(subject.decode, token) for token in tokens]
            if round_index:  # the first round warms up
                prefills[subject.name].append(first)
                decodes[subject.name] += each
    return {name: (statistics.median(prefills[name]), statistics.median(decodes[name])) for name in prefills}


def _rows(
    seconds: dict[str, tuple[float, float]], settings: BenchSettings, report: Report, limits: MachineLimits
) -> list[SpeedRow]:
    rows = []
    for name, (prefill, decode) in seconds.items():
        ours = name == ARTIFACT
        rows.append(
            SpeedRow(
                task=f"prefill, {settings.prefill} tokens, {settings.threads} thread(s)",
                subject=name,
                tokens_per_second=settings.prefill / prefill,
                bound_tokens_per_second=limits.flops / report.active_flops if ours else None,
            )
        )
        rows.append(
            SpeedRow(
                task=f"decode, one sequence, {settings.threads} thread(s)",
                subject=name,
                tokens_per_second=1 / decode,
                bound_tokens_per_second=limits.bandwidth / _active_bytes(report) if ours else None,
            )
        )
    return sorted(rows, key=lambda row: row.task, reverse=True)


def _transformers_subjects(source: Path, has_experts: bool) -> list[Subject]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    ).eval()
    if not has_experts:
        return [TransformersSubject(model, "")]
    return [TransformersSubject(model, "eager"), TransformersSubject(model, "grouped_mm")]


def _active_bytes(report: Report) -> int:
    """Bytes of weights that one decoded token has to read: each is used in one multiplication and one addition."""
    return max(report.active_flops // 2 * OutputDType(report.dtype).itemsize, 1)


def _longest(artifact: Artifact) -> int:
    return int(_config(artifact).get("max_position_embeddings") or 1 << 20)


def _vocabulary(artifact: Artifact) -> int:
    return int(_config(artifact)["vocab_size"])


def _config(artifact: Artifact) -> dict[str, Any]:
    from moec.frontend.model_config import read_config

    return read_config(artifact.onnx.parent)


def _seconds(work: Callable[[Tokens], None], tokens: Tokens) -> float:
    start = time.perf_counter()
    work(tokens)
    return time.perf_counter() - start
