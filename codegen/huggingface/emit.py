"""Writes a module as a checkpoint folder that `from_pretrained` of transformers loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from moec.artifact.options import CheckpointDType, CheckpointOptions
from moec.codegen.huggingface.experts import Change
from moec.codegen.huggingface.layout import disk_tensors
from moec.codegen.huggingface.plan import CheckpointPlan, plan_checkpoint
from moec.codegen.huggingface.shards import DiskTensor, parts, write_shards
from moec.codegen.huggingface.template import raise_module, source_folder
from moec.codegen.huggingface.values import ParameterValues
from moec.dialects.builtin import ModuleOp
from moec.errors import UsageError
from moec.frontend.model_config import CONFIG_FILE
from moec.module import Module
from moec.weights.expression import Expression
from moec.weights.tensor_spec import TensorSpec

_DEFAULTS = CheckpointOptions()


@dataclass(frozen=True)
class HuggingFaceReport:
    """What was written.

    `config_changes`: fields of config.json by their keys, with the old and the new value. `changes`: what is larger
    than in the IR. `dtype`: what `from_pretrained` loads it in. `parameters` and `nbytes` are those of the weight
    files, `source_nbytes` those of the source's.
    """

    files: tuple[str, ...]
    config_changes: dict[str, tuple[Any, Any]]
    changes: tuple[Change, ...]
    dtype: str
    parameters: int
    nbytes: int
    source_nbytes: int


def emit_huggingface(
    module: Module, folder: Path, options: CheckpointOptions = _DEFAULTS, *, original: Module | None = None
) -> HuggingFaceReport:
    """Writes config.json, the weights and their index into `folder`. `module` stays as it is.

    `original`: the module as it was loaded, before any pass; it only saves time.

    Memory is that of about one layer's largest tensor. Raises UsageError for a module that is not from a Hugging Face
    folder, UnsupportedModelError where transformers cannot express it, ResourceError where files cannot be written.
    """
    if source_folder(module) is None or not module.config:
        raise UsageError(
            "only what came from a Hugging Face folder can be written as one: a torch module has no config of "
            "transformers that describes it",
            hint="emit ONNX instead",
        )
    if options.shard_bytes < 1:
        raise UsageError(f"a shard of {options.shard_bytes} bytes holds nothing", hint="give a size such as 5GB")
    clone = module.op.clone()
    assert isinstance(clone, ModuleOp)
    ours = Module(clone, module.weights, module.source)
    raise_module(ours, with_cache=False)
    plan = plan_checkpoint(ours, uniform=options.uniform, traced=original)
    values = ParameterValues(plan.template.specs, plan.producers)
    tensors = _typed_tensors(plan, values, _wanted_type(module, options.dtype))
    folder.mkdir(parents=True, exist_ok=True)
    files = write_shards(folder, tensors, values, options.shard_bytes)
    dtype = _loaded_type(tensors)
    config = {**plan.template.values, **_facts(plan, dtype)}
    for stale in {"torch_dtype"} & config.keys():
        del config[stale]
    text = json.dumps(_encode_floats(config), indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(f"{text}\n", encoding="utf-8")
    checkpoint = module.weights.checkpoint
    return HuggingFaceReport(
        files=files,
        config_changes=_config_changes(module.config, plan.template.values),
        changes=tuple(plan.changes),
        dtype=dtype,
        parameters=sum(tensor.spec.elements for tensor in tensors),
        nbytes=sum(tensor.spec.nbytes for tensor in tensors),
        source_nbytes=0 if checkpoint is None else checkpoint.nbytes,
    )


def _typed_tensors(plan: CheckpointPlan, values: ParameterValues, wanted: torch.dtype | None) -> list[DiskTensor]:
    """The tensors on disk; None for `wanted` means each in the source's type if that is exact."""
    narrow = _source_type(plan.template.values) if wanted is None else wanted
    found = []
    for name, (expression, spec) in disk_tensors(plan.template.model, plan.template.specs, plan.producers).items():
        dtype = spec.dtype
        if dtype is torch.float32 and narrow is not torch.float32:
            exact = wanted is not None or values.origin(expression) is narrow or _holds(values, expression, narrow)
            dtype = narrow if exact else dtype
        found.append(DiskTensor(name, expression, TensorSpec(spec.shape, dtype)))
    return found


def _source_type(config: Mapping[str, Any]) -> torch.dtype:
    """The element type that the source's config names, float32 for one without or of another kind."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return getattr(torch, name) if name in ("float16", "bfloat16") else torch.float32


def _holds(values: ParameterValues, expression: Expression, dtype: torch.dtype) -> bool:
    """Whether every number of `expression` is one of `dtype`."""
    return all(torch.equal(part, part.to(dtype).to(part.dtype)) for part in parts(values, expression))


def _wanted_type(module: Module, dtype: CheckpointDType) -> torch.dtype | None:
    return None if dtype is CheckpointDType.AUTO else getattr(torch, dtype.value)


def _loaded_type(tensors: list[DiskTensor]) -> str:
    types = {tensor.spec.dtype for tensor in tensors if tensor.spec.dtype.is_floating_point}
    return str(types.pop() if len(types) == 1 else torch.float32).removeprefix("torch.")


def _facts(plan: CheckpointPlan, dtype: str) -> dict[str, Any]:
    return {
        "architectures": [plan.template.source.model_class.__name__],
        "dtype": dtype,
        "transformers_version": transformers.__version__,
    }


def _config_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*before, *after}):
        one, two = before.get(key), after.get(key)
        if isinstance(one, dict) and isinstance(two, dict):
            found.update({f"{key}.{inner}": pair for inner, pair in _config_changes(one, two).items()})
        elif one != two:
            found[key] = (one, two)
    return found


def _encode_floats(value: Any) -> Any:
    """Numbers that JSON lacks as transformers writes them."""
    if isinstance(value, dict):
        return {key: _encode_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_encode_floats(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return {"__float__": "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"}
    return value
