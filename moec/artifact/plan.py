"""What a compilation will cost, predicted from the config alone: no weight is read and nothing is traced.

The constants were fitted to compilations of the demo model, of SmolLM2-135M and of a synthetic 8 GiB checkpoint on two
cores; every compilation records prediction and outcome in measurements.json, so that a drift can be seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.artifact.measurements import Cost
from moec.artifact.options import Check, CompileOptions

if TYPE_CHECKING:
    from torch import nn

_MIB = 1 << 20
_START_SECONDS = 4.0  # importing torch, transformers and ONNX Runtime
_LAYER_SECONDS = 0.45  # tracing, passes and emission of one layer, whatever its width
_EXPERT_SECONDS = 0.004  # emission of one expert
_READ_BYTES_PER_SECOND = 400 * _MIB  # weights through conversion, digest and disk
_CHECK_BYTES_PER_SECOND = 150 * _MIB  # weights through the float64 executor
_START_MEMORY = 650 * _MIB
_GRAPH_BYTES_PER_LAYER = 40_000
_COPIES_IN_FLIGHT = 3  # of the largest tensor: as read, converted, and on its way to the file


@dataclass(frozen=True)
class Plan:
    """The prediction for one source and set of options. `largest` is the largest weight in bytes as written."""

    architecture: str
    parameters: int
    layers: int
    experts: int
    largest: int
    cost: Cost


def plan_compilation(source: Path, options: CompileOptions) -> Plan:
    """Predicts time, anonymous memory and disk of `moec compile` on a Hugging Face folder.

    Raises UsageError, UnsupportedModelError or UnsafeInputError as the frontend does for config.json.
    """
    from moec.frontend.model_config import CONFIG_FILE, read_config

    values = read_config(source)
    model = _model_on_meta(values, str(source / CONFIG_FILE))
    itemsize = options.dtype.itemsize
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    count = sum(parameter.numel() for parameter in parameters.values())
    largest = max((parameter.numel() for parameter in parameters.values()), default=0) * itemsize
    layers = int(getattr(model.config, "num_hidden_layers", 0) or 0)
    experts = _experts(model)
    written = 0 if options.weights_in_place else count * itemsize
    extra = sum(path.stat().st_size for path in source.glob("*.json") if path.name != "model.safetensors.index.json")
    disk = written + extra + _GRAPH_BYTES_PER_LAYER * layers
    checks = 0 if options.check is Check.NONE else 1
    seconds = (
        _START_SECONDS
        + _LAYER_SECONDS * layers
        + _EXPERT_SECONDS * experts
        + written / _READ_BYTES_PER_SECOND
        + checks * count * 8 / _CHECK_BYTES_PER_SECOND
    )
    memory = _START_MEMORY + _COPIES_IN_FLIGHT * largest
    return Plan(
        architecture=type(model).__name__,
        parameters=count,
        layers=layers,
        experts=experts,
        largest=largest,
        cost=Cost(seconds=round(seconds, 1), memory_bytes=memory, disk_bytes=disk),
    )


def _model_on_meta(values: dict[str, Any], where: str) -> Any:
    import torch

    from moec.frontend.model_config import resolve_model

    source = resolve_model({key: value for key, value in values.items() if key != "quantization_config"}, where)
    with torch.device("meta"):
        return source.model_class._from_config(source.config, dtype=torch.float32)


def _experts(model: nn.Module) -> int:
    """Experts in all layers: the first size of every three-dimensional parameter's module, counted once a module."""
    return sum(
        max((parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.dim() == 3), default=0)
        for module in model.modules()
    )
