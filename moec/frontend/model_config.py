"""config.json of a Hugging Face folder: read with suspicion, before anything is built from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.errors import UnsafeInputError, UnsupportedModelError, UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CONFIG_FILE = "config.json"
_MAX_CONFIG_BYTES = 16 << 20
# No published model comes near these; beyond them a config is an accident or an attack on memory and time.
_MAX_NUMBER = 1 << 40
_MAX_LAYERS = 10_000
_MAX_NESTING = 32
_IMPLEMENTATION_KEYS = (
    "_attn_implementation",
    "attn_implementation",
    "_attn_implementation_internal",
    "_experts_implementation",
    "experts_implementation",
)
_EXPERT_COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_SPECIAL_FLOATS = ("Infinity", "-Infinity", "NaN")
_TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class ModelSource:
    """A checked config and the class of transformers that it belongs to."""

    config: PretrainedConfig
    model_class: type[PreTrainedModel]
    is_decoder: bool

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)


def read_config(folder: Path) -> dict[str, Any]:
    """The dictionary in config.json, checked by `check_config`.

    Raises UsageError if there is no such file and UnsafeInputError if it is not a JSON object of reasonable size.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UsageError(f"there is no {CONFIG_FILE}", where=str(folder), hint="give a Hugging Face model folder")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise UnsafeInputError(f"{CONFIG_FILE} is larger than {_MAX_CONFIG_BYTES >> 20} MiB", where=str(path))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UnsafeInputError(f"{CONFIG_FILE} is not valid JSON: {error}", where=str(path)) from error
    if not isinstance(values, dict):
        raise UnsafeInputError(f"{CONFIG_FILE} holds a {type(values).__name__}, not an object", where=str(path))
    check_config(values, str(path))
    decoded: dict[str, Any] = _decode_floats(values)
    return decoded


def check_config(values: dict[str, Any], where: str) -> None:
    """Refuses remote code, kernels from the hub, absurd numbers and contradictory expert counts.

    Raises UnsafeInputError or UnsupportedModelError, both naming `where` and the key.
    """
    _check_numbers(values, where, 0)
    for section in _sections(values):
        if section.get("auto_map"):
            raise UnsafeInputError(
                "the model brings its own Python code (auto_map), which moec never runs",
                where=where,
                hint="use a model whose architecture is part of transformers",
            )
        for key in _IMPLEMENTATION_KEYS:
            name = section.get(key)
            if isinstance(name, str) and ("/" in name or ":" in name or "@" in name):
                raise UnsafeInputError(
                    f"{key} = {name!r} asks for code from the hub", where=where, hint=f"remove {key}"
                )
        experts, top_k = _first(section, _EXPERT_COUNT_KEYS), _first(section, _TOP_K_KEYS)
        if experts is not None and top_k is not None and 0 < experts < top_k:
            raise UnsupportedModelError(f"{top_k} experts per token, but only {experts} experts", where=where)


def resolve_model(values: dict[str, Any], where: str) -> ModelSource:
    """The config object and model class of transformers for a checked config dictionary.

    Raises UnsupportedModelError for an unknown `model_type`, an unknown class or one that is neither a decoder with a
    language model head nor an encoder.
    """
    import difflib

    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING.keys()), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see docs for the architectures that are known to work"
        raise UnsupportedModelError(f"unknown model_type {model_type!r}", where=where, hint=hint)
    _check_aliases(values, CONFIG_MAPPING[model_type].attribute_map, where)
    try:
        config = CONFIG_MAPPING[model_type].from_dict(dict(values))
    except Exception as error:
        raise UnsupportedModelError(
            f"transformers refuses this config: {type(error).__name__}: {str(error).strip()[:300]}", where=where
        ) from error
    causal = _names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type))
    masked = _names(MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(model_type))
    base = _names(MODEL_MAPPING_NAMES.get(model_type))
    declared = values.get("architectures") or []
    name = str(declared[0]) if declared else (masked or causal or base or [""])[0]
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise UnsupportedModelError(
            f"transformers has no model class {name!r} for model_type {model_type!r}", where=where
        )
    model_class: Any = found
    if not isinstance(config, model_class.config_class):
        raise UnsupportedModelError(f"{name} is not a model of model_type {model_type!r}", where=where)
    is_decoder = name in causal
    if not is_decoder and model_class.main_input_name != "input_ids":
        raise UnsupportedModelError(f"{name} does not take token ids", where=where)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder model", where=where)
    return ModelSource(config, model_class, is_decoder)


def _check_aliases(values: dict[str, Any], attribute_map: dict[str, str], where: str) -> None:
    """Refuses two names of one setting with different values, of which transformers would silently take one."""
    for alias, name in attribute_map.items():
        if alias in values and name in values and values[alias] != values[name]:
            raise UnsupportedModelError(
                f"{alias} = {values[alias]!r} contradicts {name} = {values[name]!r}, another name of the same setting",
                where=where,
                hint=f"remove {alias}",
            )


def _decode_floats(value: Any) -> Any:
    """transformers writes numbers that JSON lacks as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if set(value) == {"__float__"} and value["__float__"] in _SPECIAL_FLOATS:
            return float(value["__float__"])
        return {key: _decode_floats(item) for key, item in value.items()}
    return [_decode_floats(item) for item in value] if isinstance(value, list) else value


def _names(entry: Any) -> list[str]:
    if entry is None:
        return []
    return [entry] if isinstance(entry, str) else list(entry)


def _sections(values: dict[str, Any]) -> list[dict[str, Any]]:
    found = [values]
    for value in values.values():
        if isinstance(value, dict):
            found.extend(_sections(value))
    return found


def _first(section: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    for key in keys:
        value = section.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _check_numbers(value: Any, where: str, depth: int, key: str = "") -> None:
    if depth > _MAX_NESTING:
        raise UnsafeInputError(f"{CONFIG_FILE} is nested more than {_MAX_NESTING} deep", where=where)
    if isinstance(value, dict):
        for name, item in value.items():
            _check_numbers(item, where, depth + 1, str(name))
    elif isinstance(value, list):
        for item in value:
            _check_numbers(item, where, depth + 1, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        limit = _MAX_LAYERS if key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") else _MAX_NUMBER
        if abs(value) > limit:
            raise UnsafeInputError(f"{key} = {value} is beyond every real model (limit {limit})", where=where)
