"""Whether a model has experts already, told from its config alone: no weight is read and nothing is traced."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


class ModelKind(Enum):
    """What a recipe is for, or what a source is."""

    DENSE = "dense"  # no layer has experts
    MOE = "moe"  # at least one layer has
    ANY = "any"  # of a recipe: either

    def takes(self, source: ModelKind) -> bool:
        """Whether a recipe of this kind is for a source of that kind."""
        return self is ModelKind.ANY or self is source


@dataclass(frozen=True)
class ModelShape:
    """`parameters` are counted once where they are tied, `experts` over all layers, and `expert_parameters` are theirs;
    `largest` is the largest matrix, in bytes of float32."""

    architecture: str
    parameters: int
    layers: int
    experts: int
    expert_parameters: int
    largest: int

    @property
    def kind(self) -> ModelKind:
        """DENSE or MOE."""
        return ModelKind.MOE if self.experts else ModelKind.DENSE


def model_shape(source: Path) -> ModelShape:
    """The sizes of the model in a Hugging Face folder, from config.json.

    Raises UsageError, UnsupportedModelError or UnsafeInputError as the frontend does for config.json.
    """
    from moec.frontend.model_config import CONFIG_FILE, read_config

    model = _model_on_meta(read_config(source), str(source / CONFIG_FILE))
    parameters = list({id(parameter): parameter for parameter in model.parameters()}.values())
    return ModelShape(
        type(model).__name__,
        sum(parameter.numel() for parameter in parameters),
        int(getattr(model.config, "num_hidden_layers", 0) or 0),
        *_experts(model),
        # experts are read one by one, whatever stack they are in
        max((4 * math.prod(parameter.shape[-2:]) for parameter in parameters), default=0),
    )


def _model_on_meta(values: dict[str, Any], where: str) -> Any:
    import torch

    from moec.frontend.model_config import resolve_model

    source = resolve_model({key: value for key, value in values.items() if key != "quantization_config"}, where)
    with torch.device("meta"):
        return source.model_class._from_config(source.config, dtype=torch.float32)


def _experts(model: nn.Module) -> tuple[int, int]:
    """(experts in all layers, their parameters).

    Experts are the first size of the three-dimensional parameters of each module, and the members of lists that are
    called experts. Kernels of convolutions and tables for a batch of one are none.
    """
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    found, size = 0, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "experts":
            found += len(module)
            size += sum(parameter.numel() for parameter in module.parameters())
        elif not isinstance(module, _ConvNd):
            stacks = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
            stacks = [parameter for parameter in stacks if parameter.shape[0] > 1]
            found += max((parameter.shape[0] for parameter in stacks), default=0)
            size += sum(parameter.numel() for parameter in stacks)
    return found, size
