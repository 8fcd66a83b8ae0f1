"""Losses of sources and artifacts on text files, before against after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from moec.artifact.comparison import compare_with_source
from moec.artifact.loss import LossSettings, Scorer, artifact_scorer, cross_entropy, measure_loss
from moec.artifact.measurements import Comparison, LossRow
from moec.artifact.opened import ONNX_FOLDER, Artifact
from moec.artifact.options import default_store
from moec.artifact.report import REPORT_JSON, read_report, write_report
from moec.artifact.runtime import OnnxModel
from moec.artifact.text import TextCodec
from moec.artifact.tokens import TokenBatch, function_inputs
from moec.errors import UsageError
from moec.frontend.huggingface import load_huggingface
from moec.reference.executor import Executor
from moec.weights.store import WeightStore

if TYPE_CHECKING:
    from moec.module import Module


def evaluate_source(folder: Path, texts: Sequence[Path], settings: LossSettings) -> list[LossRow]:
    """Losses of a model folder, by the reference executor in float32. Raises UsageError for an encoder."""
    module = load_huggingface(folder)
    codec = TextCodec(folder)
    score = source_scorer(module)
    return [measure_loss(codec.read(text), "source", score, settings) for text in texts]


@dataclass(frozen=True)
class Evaluation:
    """Losses of an artifact, and what it is against its source where that was asked for."""

    losses: tuple[LossRow, ...]
    comparison: Comparison | None = None


def evaluate_artifact(
    folder: Path,
    texts: Sequence[Path],
    settings: LossSettings,
    *,
    compare: bool = False,
    against: Path | None = None,
    store: Path | None = None,
    threads: int | None = None,
) -> Evaluation:
    """Losses of an artifact through its cache; `compare` puts those of its source in front of each.

    With `compare` routers and experts are compared too, on the first text; `store` has the tensors that passes
    computed. What is found also goes into the artifact's report. Raises UsageError for an encoder, or if the source is
    not there.
    """
    artifact = Artifact.open(folder)
    model = OnnxModel(artifact.onnx, threads=threads)
    if not model.is_decoder:
        raise _no_language_model(str(folder))
    codec = TextCodec(folder / ONNX_FOLDER)
    source = None
    if compare:
        stored = WeightStore(store or default_store())
        source = load_huggingface(artifact.source_folder(against), stored, artifact.other_folders())
    before = None if source is None else source_scorer(source)
    score = artifact_scorer(model, settings)
    rows = []
    for path in texts:
        text = codec.read(path)
        if before is not None:
            rows.append(measure_loss(text, "source", before, settings))
        rows.append(measure_loss(text, "artifact", score, settings))
    comparison = None
    if source is not None:
        comparison = compare_with_source(source, artifact.module(source), artifact.onnx, codec.read(texts[0]), settings)
    if (folder / REPORT_JSON).is_file():
        report = read_report(folder)
        measured = {(row.subject, row.text) for row in rows}
        kept = [row for row in report.losses if (row.subject, row.text) not in measured]
        found = {"losses": (*kept, *rows), "comparison": comparison or report.comparison}
        write_report(folder, report.model_copy(update=found))
    return Evaluation(tuple(rows), comparison)


def source_scorer(module: Module) -> Scorer:
    """Scores with the reference executor, one pass over each window. Raises UsageError for an encoder."""
    if module.source.kind != "decoder":
        raise _no_language_model(str(module.source.folder))
    executor = Executor(module.op, module.weights, keep_weights=False)

    def score(inputs: NDArray[np.int64], targets: NDArray[np.int64]) -> float:
        batch = TokenBatch(np.ascontiguousarray(inputs), np.ones_like(inputs))
        with torch.no_grad():
            results = executor.run(function_inputs(module.main, batch))
        return cross_entropy(next(iter(results.values())).numpy(), targets)

    return score


def _no_language_model(where: str) -> UsageError:
    return UsageError("this model is an encoder: it predicts no text", where=where, hint="use `moec run` to embed text")
