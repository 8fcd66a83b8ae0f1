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
from typing import Any

import numpy as np
import torch

from moec.artifact.machine_limits import MachineLimits, measure_limits
from moec.artifact.measurements import SpeedRow
from moec.artifact.opened import Artifact
from moec.artifact.options import Backend, OutputDType
from moec.artifact.report import Report, read_report, write_report
from moec.artifact.speed_subjects import (
    ARTIFACT,
    OnnxSubject,
    Subject,
    Tokens,
    kernel_subjects,
    transformers_subjects,
)
from moec.codegen.triton.rendering import PACKAGE_NAME
from moec.codegen.triton.spec import Element
from moec.errors import UsageError


@dataclass(frozen=True)
class BenchSettings:
    """Tokens of the prompt that is fed at once, tokens that are decoded behind it, and rounds; one sequence."""

    prefill: int = 512
    decode: int = 32
    rounds: int = 5
    threads: int = 1
    seed: int = 0


def bench_folder(
    folder: Path,
    settings: BenchSettings,
    *,
    against: Path | None = None,
    beside: Sequence[Path] = (),
    alone: bool = False,
) -> list[SpeedRow]:
    """Measures the artifact in `folder`, unless `alone` its source in transformers, and other exports `beside` it.

    Its kernels are measured where there is a GPU, in the source and beside torch's grouped_mm. Rows also go into the
    artifact's report. Raises UsageError for an encoder, without anything to measure, or if the source is not there.
    """
    artifact = Artifact.open(folder)
    report = read_report(folder)
    config = _config(artifact, against)
    longest = int(config.get("max_position_embeddings") or 1 << 20)
    settings = replace(settings, prefill=min(settings.prefill, longest - settings.decode))
    vocabulary = int(config["vocab_size"])
    device = kernel_device() if artifact.has(Backend.TRITON) else ""
    if not artifact.has(Backend.ONNX) and not device:
        raise UsageError(
            "the artifact has nothing that can be measured here: kernels are measured on a GPU, and there is none",
            where=str(folder),
            hint="compile it with --emit onnx too",
        )
    torch.set_num_threads(settings.threads)
    rows: list[SpeedRow] = []
    if artifact.has(Backend.ONNX):
        subjects: list[Subject] = [OnnxSubject(ARTIFACT, artifact.onnx, settings.threads)]
        names = export_names(beside)
        subjects += [OnnxSubject(name, path, settings.threads) for name, path in zip(names, beside, strict=True)]
        if not alone:
            has_experts = any(layer.classes for layer in report.layers)
            subjects += transformers_subjects(artifact.source_folder(against), has_experts)
        limits = measure_limits(_active_bytes(report), settings.threads)
        found = _measure(subjects, settings, vocabulary)
        rows += _rows(found, settings, f"{settings.threads} thread(s)", report, limits)
    if device:
        package = artifact.kernels / PACKAGE_NAME
        element = Element(artifact.manifest.build.dtype).torch
        subjects = kernel_subjects(artifact.source_folder(against), package, element, device)
        rows += _rows(_measure(subjects, settings, vocabulary), settings, f"{element} on {device}", report)
    write_report(folder, report.model_copy(update={"speeds": tuple(rows)}))
    return rows


def kernel_device() -> str:
    """Where kernels are measured: empty without a GPU, as the interpreter's time says nothing."""
    return "cuda" if torch.cuda.is_available() else ""


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
    seconds: dict[str, tuple[float, float]],
    settings: BenchSettings,
    place: str,
    report: Report,
    limits: MachineLimits | None = None,
) -> list[SpeedRow]:
    """`limits` are those of the machine that the exported model runs on."""
    rows = []
    for name, (prefill, decode) in seconds.items():
        bounds = limits if name == ARTIFACT else None
        rows.append(
            SpeedRow(
                task=f"prefill, {settings.prefill} tokens, {place}",
                subject=name,
                tokens_per_second=settings.prefill / prefill,
                bound_tokens_per_second=bounds.flops / report.active_flops if bounds else None,
            )
        )
        rows.append(
            SpeedRow(
                task=f"decode, one sequence, {place}",
                subject=name,
                tokens_per_second=1 / decode,
                bound_tokens_per_second=bounds.bandwidth / _active_bytes(report) if bounds else None,
            )
        )
    return sorted(rows, key=lambda row: row.task, reverse=True)


def _active_bytes(report: Report) -> int:
    """Bytes of weights that one decoded token has to read: each is used in one multiplication and one addition."""
    return max(report.active_flops // 2 * OutputDType(report.dtype).itemsize, 1)


def _config(artifact: Artifact, against: Path | None) -> dict[str, Any]:
    from moec.frontend.model_config import read_config

    exported = artifact.has(Backend.ONNX)
    return read_config(artifact.onnx.parent if exported else artifact.source_folder(against))


def _seconds(work: Callable[[Tokens], None], tokens: Tokens) -> float:
    start = time.perf_counter()
    work(tokens)
    return time.perf_counter() - start
