"""What a compilation will cost, predicted from the config alone: no weight is read and nothing is traced.

The constants were fitted to compilations of the demo model and of SmolLM2-135M on an otherwise idle core; every
compilation records prediction and outcome in measurements.json, so that a drift can be seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.artifact.measurements import Cost
from moec.artifact.options import COPIED_FILES, LEAN_BYTES, Check, CompileOptions

if TYPE_CHECKING:
    from torch import nn

_MIB = 1 << 20
_START_SECONDS = 5.0  # what the first trace of a process costs
_LAYER_SECONDS = 0.45  # tracing, passes and emission of one layer, whatever its width
_EXPERT_SECONDS = 0.004  # emission of one expert
_WRITTEN_BYTES_PER_SECOND = 400 * _MIB  # weights through conversion, digest and disk
_COMPARED_SECONDS = 3.5e-8  # per parameter: once through the ledger in float64, once through the verification
_GRAPH_BYTES_PER_LAYER = 60_000  # model.onnx, module.mlir and the report
_START_MEMORY = 370 * _MIB
_COPIES = 2.5  # of the largest matrix in float32: as read, converted, and on its way


@dataclass(frozen=True)
class Plan:
    """The prediction for one source and set of options. `largest` is the largest matrix in bytes of float32."""

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
    parameters = list({id(parameter): parameter for parameter in model.parameters()}.values())
    count = sum(parameter.numel() for parameter in parameters)
    # Experts are read one by one, whatever stack they are in.
    largest = max((4 * math.prod(parameter.shape[-2:]) for parameter in parameters), default=0)
    layers = int(getattr(model.config, "num_hidden_layers", 0) or 0)
    experts = _experts(model)
    written = 0 if options.weights_in_place else count * options.dtype.itemsize
    companions = sum((source / name).stat().st_size for name in COPIED_FILES if (source / name).is_file())
    comparisons = int(options.check is not Check.NONE) + int(options.verify)
    seconds = (
        _START_SECONDS
        + _LAYER_SECONDS * layers
        + _EXPERT_SECONDS * experts
        + written / _WRITTEN_BYTES_PER_SECOND
        + _COMPARED_SECONDS * comparisons * count
    )
    memory = _START_MEMORY + round(_COPIES * largest)
    if options.verify and written <= LEAN_BYTES:
        memory += written
    return Plan(
        architecture=type(model).__name__,
        parameters=count,
        layers=layers,
        experts=experts,
        largest=largest,
        cost=Cost(
            seconds=round(seconds, 1),
            memory_bytes=memory,
            disk_bytes=written + companions + _GRAPH_BYTES_PER_LAYER * max(layers, 1),
        ),
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
