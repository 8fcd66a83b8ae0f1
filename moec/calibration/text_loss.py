"""The loss of a model on the calibration text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moec.artifact.loss import cross_entropy
from moec.artifact.tokens import function_inputs
from moec.calibration.data import CalibrationData
from moec.errors import UsageError
from moec.reference.executor import Executor

if TYPE_CHECKING:
    from moec.module import Module

_ROWS = 16


def text_loss(module: Module, data: CalibrationData) -> float:
    """Mean loss in nats per token of a decoder on the sequences, in float32.

    Raises UsageError for a model that predicts no next token, and for a text without tokens that another one predicts.
    """
    if module.source.kind != "decoder":
        raise UsageError("this model predicts no next token", hint="losses of text are those of decoders")
    total, tokens = 0.0, 0
    executor = Executor(module.op, module.weights)
    for batch in data.batches(_ROWS, padding_in_front=False):
        with torch.no_grad():
            results = executor.run(function_inputs(module.main, batch))
        logits = next(iter(results.values()))
        scored = torch.from_numpy(batch.mask[:, 1:] > 0)
        total += cross_entropy(logits[:, :-1][scored].numpy(), torch.from_numpy(batch.ids[:, 1:])[scored].numpy())
        tokens += int(scored.sum())
    if not tokens:
        raise UsageError("the calibration text has no token that another one predicts", hint="calibrate on more text")
    return total / tokens
