"""From a checked config to an exported program: token ids to logits for any batch size and length, without weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from transformers import PreTrainedModel

from moec.errors import MoecError, UnsupportedModelError
from moec.frontend.data_branches import attributes_kept, trace_both_sides
from moec.frontend.decompositions import decompose
from moec.frontend.empty_model import EmptyModel
from moec.frontend.hooks import dispatching_to_hooks
from moec.frontend.model_config import ModelSource
from moec.frontend.size_guards import refuse_fixed_sizes
from moec.frontend.symbolic_builtins import symbolic_builtins

BATCH, SEQUENCE = "batch", "seq"
_EXAMPLE_BATCH, _EXAMPLE_LENGTH = 2, 12

DECODER_INPUTS = ("input_ids", "attention_mask", "position_ids")
ENCODER_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class TracedModel:
    """`program` computes `output_name` from `input_names`, each [batch, seq] int64. `model` has no weights.

    Parameters and buffers in `program` are named with `MODEL_PREFIX` in front of their name in `model`.
    """

    source: ModelSource
    model: PreTrainedModel
    program: ExportedProgram
    input_names: tuple[str, ...]
    output_name: str


MODEL_PREFIX = "model."


class _TokensToOutput(nn.Module):
    """Names the inputs, so that torch.export does, and gives the one output."""

    def __init__(self, model: PreTrainedModel, is_decoder: bool) -> None:
        super().__init__()
        self.model = model
        self._is_decoder = is_decoder

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if self._is_decoder:
            result = self.model(**inputs, use_cache=False).logits
        else:
            result = self.model.base_model(**inputs).last_hidden_state
        assert isinstance(result, torch.Tensor)
        return result


def trace_model(source: ModelSource, empty: EmptyModel) -> TracedModel:
    """Exports the model that `build_empty_model` made of a source.

    Raises UnsupportedModelError, with the reason and the line of the model's code, if it does not export for every
    batch size and length.
    """
    model, mode = empty.model, empty.mode
    wrapper = _TokensToOutput(model, source.is_decoder)
    names = _accepted_inputs(model if source.is_decoder else model.base_model, source)
    with mode:
        shape = (_EXAMPLE_BATCH, _EXAMPLE_LENGTH)
        example = {name: torch.zeros(shape, dtype=torch.int64, device="cpu") for name in names}
    dynamic = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in names}
    where = f"{source.model_class.__name__} ({source.model_type})"

    def trace() -> ExportedProgram:
        with attributes_kept(model):
            program = export(wrapper.eval(), (), example, dynamic_shapes=dynamic, strict=False)
        axes = {name: {0: BATCH, 1: SEQUENCE} for name in names}
        refuse_fixed_sizes(program, axes, where, _longest(source))
        program = decompose(program)
        refuse_fixed_sizes(program, axes, where, _longest(source))
        return program

    with torch.no_grad(), exporting(where), dispatching_to_hooks(), symbolic_builtins(model):
        try:
            program = trace()
        except GuardOnDataDependentSymNode:
            program = trace_both_sides(trace, where)
    output = "logits" if source.is_decoder else "last_hidden_state"
    return TracedModel(source, model, program, tuple(names), output)


def _longest(source: ModelSource) -> dict[str, int]:
    """The longest sequence that the model is defined for, where its config says so."""
    length = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    return {SEQUENCE: length} if isinstance(length, int) else {}


def _accepted_inputs(model: nn.Module, source: ModelSource) -> list[str]:
    """The standard inputs that the model's forward takes, in the standard order."""
    import inspect

    accepted = inspect.signature(model.forward).parameters
    names = [name for name in (DECODER_INPUTS if source.is_decoder else ENCODER_INPUTS) if name in accepted]
    if "attention_mask" not in names or "input_ids" not in names:
        raise UnsupportedModelError("the model does not take input_ids and attention_mask", where=type(model).__name__)
    return names


@contextmanager
def exporting(where: str) -> Iterator[None]:
    """Around torch.export: no warnings, and errors as UnsupportedModelError with the line of the model's code."""
    try:
        # torch prints the graph so far to stderr when a trace fails
        with _without_warnings(), redirect_stderr(StringIO()):
            yield
    except MoecError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"the model cannot be exported: {type(error).__name__}: {_summary(error)}",
            where=f"{where} {_model_line(error)}".strip(),
        ) from error


def _summary(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:400]


def _model_line(error: BaseException) -> str:
    """The last line of the model's own code on the way to an error."""
    import traceback

    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/transformers/models/" in frame.filename]
    if not frames:
        return ""
    return f"at {frames[-1].filename.split('/transformers/')[-1]}:{frames[-1].lineno} in {frames[-1].name}"


@contextmanager
def _without_warnings() -> Iterator[None]:
    loggers: list[Any] = [
        logging.getLogger(name) for name in ("torch.export", "torch.fx", "torch._export", "transformers")
    ]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
