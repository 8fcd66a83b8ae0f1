"""A Hugging Face model folder as a module: config.json, safetensors and nothing else is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moec.frontend.checkpoint_mapping import CheckpointMapping, map_checkpoint
from moec.frontend.empty_model import build_empty_model
from moec.frontend.graph_importer import ImportNames
from moec.frontend.import_graph import ImportOptions, first_names, import_program
from moec.frontend.model_config import CONFIG_FILE, read_config, resolve_model
from moec.frontend.other_sources import join_sources
from moec.frontend.trace import BATCH, MODEL_PREFIX, SEQUENCE, TracedModel, trace_model
from moec.ir import symbol
from moec.module import Module, SourceFacts
from moec.weights.checkpoint import Checkpoint
from moec.weights.context import WeightContext
from moec.weights.store import WeightStore


def load_huggingface(folder: str | Path, store: WeightStore | None = None, others: Sequence[str | Path] = ()) -> Module:
    """Traces the model in `folder` and ties its parameters to the checkpoint's tensors; no weight is read.

    `store`: where passes put the tensors that they compute. `others`: folders of models of the same shape and tokens,
    whose weights passes can ask for. The function `main` maps `input_ids`, `attention_mask` and,
    where the model reads them, `position_ids` or `token_type_ids`, all [batch, seq] int64, to `logits`
    [batch, seq, vocabulary] (decoders) or `last_hidden_state` [batch, seq, hidden] (encoders), in float32.

    Raises UsageError, UnsupportedModelError or UnsafeInputError as `read_config`, `Checkpoint.open`, `map_checkpoint`,
    `join_sources` and `trace_model` do.
    """
    folder = Path(folder)
    values = read_config(folder)
    where = str(folder / CONFIG_FILE)
    checkpoint = Checkpoint.open(folder)
    joined, found = join_sources(folder, checkpoint, [Path(other) for other in others])
    source = resolve_model(_without_quantization(values), where)
    empty = build_empty_model(source)
    mapping = map_checkpoint(
        empty.model,
        checkpoint,
        quantization_config=values.get("quantization_config"),
        required=None if source.is_decoder else (),
    )
    traced = trace_model(source, empty)
    sources = {name: str(expression) for name, expression in mapping.expressions.items()}
    graph = import_program(traced.program, import_options(traced, sources))
    unused = _unused(mapping, graph.used_weights)
    facts = SourceFacts(
        kind="decoder" if source.is_decoder else "encoder",
        model_type=source.model_type,
        class_name=source.model_class.__name__,
        config=values,
        folder=folder,
        tensors_total=len(checkpoint),
        tensors_used=len(checkpoint) - len(unused),
        tensors_unused=unused,
    )
    return Module(graph.module, WeightContext(joined, store), facts, others=found)


def import_options(traced: TracedModel, sources: dict[str, str]) -> ImportOptions:
    """How a traced transformers model is imported, given the weight expression text of each of its parameters."""
    sizes = (symbol(BATCH), symbol(SEQUENCE))
    return ImportOptions(
        names=ImportNames(MODEL_PREFIX, sources, first_names(traced.model)),
        inputs=dict.fromkeys(traced.input_names, sizes),
        result_names=(traced.output_name,),
    )


def _without_quantization(values: dict[str, Any]) -> dict[str, Any]:
    """The config of the model that the dequantised weights belong to."""
    return {key: value for key, value in values.items() if key != "quantization_config"}


def _unused(mapping: CheckpointMapping, used_weights: tuple[str, ...]) -> dict[str, str]:
    read = set(used_weights)
    read_tensors = {reference.name for name in read for reference in mapping.expressions[name].references()}
    unused = dict.fromkeys(mapping.ignored, "transformers ignores it for this model")
    unused.update(
        (name, "belongs to a part that the output does not depend on")
        for name in mapping.used
        if name not in read_tensors
    )
    return unused
