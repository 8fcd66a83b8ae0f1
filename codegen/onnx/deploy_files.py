"""Files beside the model: `genai_config.json`, by which onnxruntime-genai generates text, and `lowering.json`, which
says how each layer of experts became ONNX and why.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moec.codegen.onnx.cost_model import Lowering
from moec.codegen.onnx.experts_packed_fused import OLDEST_RUNTIME
from moec.codegen.onnx.lower_moe import LayerLowering
from moec.codegen.onnx.targets import Target
from moec.dialects.builtin import FuncOp
from moec.ir.types import TensorType
from moec.module import Module, SourceFacts
from moec.weights.json_file import read_json_object

GENAI_FILE = "genai_config.json"
LOWERING_FILE = "lowering.json"
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_GENERATION_FILE = "generation_config.json"


def write_genai_config(module: Module, folder: Path, model_file: str) -> str | None:
    """Writes the file into `folder`; returns why not where genai cannot run the model.

    Sizes come from the function's cache inputs; token ids from the source's generation config, else its config.
    """
    function = module.main
    caches = _caches(function)
    if not caches:
        return "the model has no key/value cache"
    shapes = {(cache.shape[1], cache.shape[3]) for cache in caches}
    if len(shapes) > 1:
        return "its caches differ in heads or width, which onnxruntime-genai does not allow"
    heads, width = next(iter(shapes))
    config = _text_config(module.source)
    tokens = _token_ids(module.source, config)
    if tokens["eos_token_id"] is None:
        return "neither config.json nor generation_config.json names an end token"
    vocabulary = function.return_op.operands[0].type
    assert isinstance(vocabulary, TensorType)
    context_length = int(config.get("max_position_embeddings") or config.get("n_positions") or 2048)
    attention_heads = int(config.get("num_attention_heads") or config.get("n_head") or str(heads))
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in function.arg_names}
    inputs["past_key_names"] = "past_key_values.%d.key"
    inputs["past_value_names"] = "past_key_values.%d.value"
    decoder = {
        "session_options": {"log_id": "moec", "provider_options": []},
        "filename": model_file,
        "head_size": width,
        "hidden_size": int(config.get("hidden_size") or config.get("n_embd") or attention_heads * int(str(width))),
        "inputs": inputs,
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": attention_heads,
        "num_hidden_layers": len(caches) // 2,
        "num_key_value_heads": heads,
    }
    # the type "decoder" stands for any decoder; every other one is a list of known architectures
    model = {
        **tokens,
        "context_length": context_length,
        "decoder": decoder,
        "type": "decoder",
        "vocab_size": vocabulary.shape[-1],
    }
    document = {"model": model, "search": _search(module.source, context_length)}
    (folder / GENAI_FILE).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return None


def write_lowering_report(folder: Path, target: Target, layers: Sequence[LayerLowering]) -> None:
    """Writes the form of each layer of experts, the reason and the predicted seconds of the forms that it could have.

    What the parity gate measured is left out: it varies between machines, and equal inputs give equal files.
    """
    if not layers:
        return
    profile = target.profile
    packed = any(layer.choice.lowering is Lowering.FUSED_PACKED for layer in layers)
    document = {
        "target": target.value,
        "opset": profile.opset,
        "ir_version": profile.ir_version,
        "oldest_onnxruntime": OLDEST_RUNTIME if packed else profile.oldest_runtime,
        "layers": [
            {
                "layer": layer.layer,
                "experts": layer.experts,
                "shared_experts_inside": layer.shared,
                "lowering": layer.choice.lowering.value,
                "reason": layer.choice.reason,
                "predicted_seconds": {form.value: float(f"{time:.4g}") for form, time in layer.choice.seconds.items()},
                "main_graph_nodes": layer.nodes,
            }
            for layer in layers
        ],
    }
    (folder / LOWERING_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _caches(function: FuncOp) -> list[TensorType]:
    """Types of the cache inputs, keys and values."""
    found = []
    for argument, name in zip(function.arguments, function.arg_names, strict=True):
        if _PAST.fullmatch(name) and isinstance(argument.type, TensorType):
            found.append(argument.type)
    return found


def _text_config(source: SourceFacts) -> dict[str, Any]:
    nested = source.config.get("text_config")
    return nested if isinstance(nested, dict) else source.config


def _generation_config(source: SourceFacts) -> dict[str, Any]:
    if source.folder is None or not (source.folder / _GENERATION_FILE).is_file():
        return {}
    return read_json_object(source.folder / _GENERATION_FILE)


def _token_ids(source: SourceFacts, config: dict[str, Any]) -> dict[str, int | list[int] | None]:
    generation = _generation_config(source)

    def first_given(name: str) -> Any:
        return next(
            (values[name] for values in (generation, config, source.config) if values.get(name) is not None), None
        )

    end = first_given("eos_token_id")
    start, padding = first_given("bos_token_id"), first_given("pad_token_id")
    one_end = end[0] if isinstance(end, list) else end
    return {
        "bos_token_id": one_end if start is None else start,
        "eos_token_id": end,
        "pad_token_id": one_end if padding is None else padding,
    }


def _search(source: SourceFacts, context_length: int) -> dict[str, Any]:
    """Search options, the source's own where it has them."""
    generation = _generation_config(source)
    search: dict[str, Any] = {
        "do_sample": bool(generation.get("do_sample") or False),
        "max_length": context_length,
        "num_beams": 1,
        # the cache grows by Concat, so its buffers cannot be shared between past and present
        "past_present_share_buffer": False,
    }
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        if generation.get(name) is not None:
            search[name] = generation[name]
    return search
