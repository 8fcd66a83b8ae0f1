"""The Hugging Face folder of an artifact: written with what users of transformers need beside it, and compared."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers.utils import logging as transformers_logging

from moec.artifact.measurements import VerificationRow
from moec.artifact.options import COPIED_FILES, CheckpointDType, CheckpointOptions
from moec.artifact.runtime import positions
from moec.artifact.tokens import TokenBatch
from moec.artifact.verification import artifact_row, run_reference
from moec.codegen.huggingface.emit import HuggingFaceReport, emit_huggingface
from moec.errors import UnsupportedModelError, VerificationError
from moec.experts import Dense, FeedForward, find_moe_layers, load_expert
from moec.frontend.huggingface import load_huggingface
from moec.frontend.model_config import CONFIG_FILE, read_config, resolve_model
from moec.module import Module
from moec.weights.checkpoint import Checkpoint
from moec.weights.context import WeightContext
from moec.weights.expression import Expression

# transformers holds the model in float32, and safetensors files are mapped while they are converted.
_MEMORY_FACTOR = 2


def emit_checkpoint(
    module: Module, folder: Path, options: CheckpointOptions, *, original: Module | None = None
) -> HuggingFaceReport:
    """Writes the checkpoint into `folder`, with tokenizer, chat template and generation config of the source.

    The copied files stay as they are; nothing in them is run or rendered. Raises what `emit_huggingface` raises.
    """
    report = emit_huggingface(module, folder, options, original=original)
    source = module.source.folder
    for name in COPIED_FILES:
        if source is not None and name != CONFIG_FILE and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return report


def compare_checkpoint(
    folder: Path, module: Module, batch: TokenBatch, dtype: CheckpointDType
) -> list[VerificationRow]:
    """What `from_pretrained` of transformers makes of `folder` against the IR, in float32.

    Where `dtype` rounds the weights, against the IR with rounded weights. A model that would not fit into memory is
    read and run by moec instead, layer by layer. Raises VerificationError if transformers does not load the folder.
    """
    checkpoint = Checkpoint.open(folder)
    loaded: Module | None = None
    name, ir = "IR", module
    if dtype in (CheckpointDType.BFLOAT16, CheckpointDType.FLOAT16):
        name = f"IR with weights in {dtype.value}"
        if _has_factors(module):
            # products of factors are rounded, not the factors
            loaded, name = load_huggingface(folder), "its own weights"
        else:
            ir = Module(module.op, _RoundedWeights(module.weights, getattr(torch, dtype.value)), module.source)
    expected = run_reference((loaded or ir).op, (loaded or ir).weights, batch)
    count = sum(checkpoint.spec(tensor).elements for tensor in checkpoint)
    if _MEMORY_FACTOR * 4 * count > _free_memory():
        loaded = load_huggingface(folder)
        output = run_reference(loaded.op, loaded.weights, batch).output
        return [artifact_row(f"checkpoint read by moec against {name}", output, expected, batch)]
    output = _run_transformers(folder, batch)
    return [artifact_row(f"checkpoint in transformers against {name}", output, expected, batch)]


def differing_tensor(folder: Path, again: Path) -> str | None:
    """The first tensor in which two checkpoints differ; None where all are equal."""
    one, two = Checkpoint.open(folder), Checkpoint.open(again)
    names: set[str] = {*one, *two}
    for name in sorted(names):
        if name not in one or name not in two or one.digest(name) != two.digest(name):
            return name
    return None


def _run_transformers(folder: Path, batch: TokenBatch) -> NDArray[np.float32]:
    source = resolve_model(read_config(folder), str(folder / CONFIG_FILE))
    model_class = getattr(transformers, source.model_class.__name__)
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model, information = model_class.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        raise VerificationError(f"transformers does not load the checkpoint: {error}", where=str(folder)) from error
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    wrong = {key: sorted(map(str, names)) for key, names in information.items() if names}
    if source.is_decoder and wrong:
        listed = "; ".join(f"{key}: {', '.join(names[:3])}" for key, names in wrong.items())
        raise VerificationError(f"transformers does not load all of the checkpoint: {listed}", where=str(folder))
    model.eval()
    part = model if source.is_decoder else model.base_model
    known = {
        "input_ids": batch.ids,
        "attention_mask": batch.mask,
        "position_ids": positions(batch.mask) if source.is_decoder else None,
    }
    accepted: Iterable[str] = inspect.signature(part.forward).parameters
    inputs = {
        key: torch.from_numpy(np.ascontiguousarray(value))
        for key, value in known.items()
        if value is not None and key in accepted
    }
    try:
        with torch.no_grad():
            result = part(**inputs)
    except Exception as error:
        raise VerificationError(f"transformers does not run the checkpoint: {error}", where=str(folder)) from error
    output: NDArray[np.float32] = (result.logits if source.is_decoder else result.last_hidden_state).numpy()
    return output


class _RoundedWeights(WeightContext):
    """Weights as a checkpoint of 16-bit floats has them."""

    def __init__(self, weights: WeightContext, dtype: torch.dtype) -> None:
        super().__init__(weights.checkpoint, weights.store)
        self._dtype = dtype

    def load(self, expression: Expression | str, index: int | slice | None = None) -> torch.Tensor:
        """As `WeightContext.load`, floats through the 16-bit type."""
        value = super().load(expression, index)
        return value.to(self._dtype).to(value.dtype) if value.is_floating_point() else value


def _has_factors(module: Module) -> bool:
    for layer in find_moe_layers(module.op):
        for group in layer.experts.classes:
            try:
                expert = load_expert(layer, module.weights, group.experts[0])
            except UnsupportedModelError:
                continue
            if isinstance(expert, FeedForward):
                projections = [item for item in (expert.gate, expert.up, expert.down) if item is not None]
                if not all(isinstance(item.matrix, Dense) for item in projections):
                    return True
    return False


def _free_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
