"""A transformers model with its shape but without its weights.

Parameters and persistent buffers become fake CPU tensors, which have a shape and no memory. Non-persistent buffers
(rotary frequencies, embedding scales) are not in any checkpoint: transformers computes them, so they are real here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import PretrainedConfig, PreTrainedModel

from moec.errors import UnsupportedModelError
from moec.frontend.expert_body import is_stacked_experts, trace_stacked_experts
from moec.frontend.hooks import BODY_ATTRIBUTE, EXPERTS_HOOK
from moec.frontend.model_config import ModelSource
from moec.frontend.same_computation import same_computation
from moec.frontend.unregistered_experts import replace_expert_loops

_MAX_PARAMETERS = 1 << 47


@dataclass(frozen=True)
class EmptyModel:
    """A model of fake tensors and the mode that they belong to."""

    model: PreTrainedModel
    mode: FakeTensorMode


def build_empty_model(source: ModelSource) -> EmptyModel:
    """The float32 model of a source in eval mode, dispatching to the operations of `hooks`.

    Raises UnsupportedModelError if transformers cannot build it or if a computed buffer cannot be had.
    """
    config = source.config
    where = f"{source.model_class.__name__} ({source.model_type})"
    config.use_cache = False
    # A model that does not ask the registry for its attention computes it itself, as "eager".
    attention = "sdpa" if source.model_class._can_set_attn_implementation() else "eager"
    built_as = attention if source.model_class._supports_sdpa else "eager"
    try:
        with torch.device("meta"), _quiet():
            model = source.model_class._from_config(config, dtype=torch.float32, attn_implementation=built_as)
    except Exception as error:
        raise UnsupportedModelError(
            f"transformers cannot build this model: {type(error).__name__}: {str(error).strip()[:300]}", where=where
        ) from error
    model.eval().requires_grad_(False)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > _MAX_PARAMETERS:
        raise UnsupportedModelError(f"the model would have {count} parameters", where=where)
    for part in model.modules():
        if isinstance(getattr(part, "config", None), PretrainedConfig):
            part.config._attn_implementation_internal = attention
    replace_expert_loops(model)
    _trace_experts(model)
    _compute_buffers(model, where)
    return EmptyModel(model, _make_fake(model))


def _trace_experts(model: PreTrainedModel) -> None:
    digests: dict[Any, str] = {}
    for name, module in model.named_modules():
        if is_stacked_experts(module):
            # One trace takes half a second, and most models have one kind of expert in all layers.
            equal = next((other for other in digests if same_computation(module, other)), None)
            digests[module] = digests[equal] if equal is not None else trace_stacked_experts(module, name).digest
    for module, digest in digests.items():
        setattr(module, BODY_ATTRIBUTE, digest)
        # The registry looks at the config of each block, which for composite models is not the model's own.
        module.config._experts_implementation = EXPERTS_HOOK
    if digests:
        model.config._experts_implementation = EXPERTS_HOOK


def non_persistent_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(owner, name in the owner, full name) of the buffers that no checkpoint holds."""
    for prefix, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            if module._buffers.get(name) is not None:
                yield module, name, f"{prefix}.{name}" if prefix else name


def _compute_buffers(model: PreTrainedModel, where: str) -> None:
    """Gives each non-persistent buffer its value by transformers' own initialisation."""
    buffers = list(non_persistent_buffers(model))
    for owner, name, _ in buffers:
        empty = owner._buffers[name]
        assert empty is not None
        poison = float("nan") if empty.is_floating_point() or empty.is_complex() else _integer_poison(empty.dtype)
        owner._buffers[name] = torch.full(empty.shape, poison, dtype=empty.dtype, device="cpu")
    with torch.no_grad():
        model.initialize_weights()
    for owner, name, full_name in buffers:
        value = owner._buffers[name]
        assert value is not None
        poisoned = (
            value.isnan() if value.is_floating_point() or value.is_complex() else value == _integer_poison(value.dtype)
        )
        if value.device.type == "meta" or (value.dtype != torch.bool and bool(poisoned.any())):
            raise UnsupportedModelError(f"transformers does not compute the buffer {full_name!r}", where=where)


def _integer_poison(dtype: torch.dtype) -> int:
    return 0 if dtype == torch.bool else torch.iinfo(dtype).min


def _make_fake(model: nn.Module) -> FakeTensorMode:
    """Replaces every meta tensor of the model by a fake CPU tensor; tied tensors stay tied."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    replaced: dict[torch.Tensor, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if tensor not in replaced:
            with mode:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                is_parameter = isinstance(tensor, nn.Parameter)
                replaced[tensor] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
        return replaced[tensor]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.device.type == "meta":
                    tensors[name] = fake(tensor)  # type: ignore[assignment]
    return mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' advice to use other attention implementations."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
