"""Runs passes on modules and measures that they still compute the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from moec.artifact.options import RAISING_PIPELINE
from moec.frontend.huggingface import load_huggingface
from moec.frontend.torch_export import load_torch
from moec.ir import verify
from moec.module import Module
from moec.pipeline.base import PassContext
from moec.pipeline.registry import find_pass
from moec.reference.executor import Executor
from tests.frontend.tiny_models import random_tokens, save_tiny_checkpoint

LENGTH, LEFT_PADDING = 13, 3


def apply(module: Module, pipeline: str) -> PassContext:
    """Runs passes (names with commas), each followed by the verifier."""
    context = PassContext(weights=module.weights, module=module)
    for name in pipeline.split(","):
        find_pass(name)().run(module.op, context)
        verify(module.op)
    return context


def compute(module: Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The results in float64."""
    return Executor(module.op, module.weights, dtype=torch.float64).run(inputs)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


def raised(module: nn.Module, pipeline: str = RAISING_PIPELINE, **inputs: torch.Tensor) -> tuple[Module, PassContext]:
    """A module of torch with inputs [batch, seq, ...], after passes that must not change what it computes."""
    torch.manual_seed(0)
    module = copy.deepcopy(module).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    dynamic = {name: {0: "batch", 1: "seq"} for name in inputs}
    traced = load_torch(module, inputs, dynamic=dynamic)
    expected = compute(traced, inputs)
    context = apply(traced, pipeline)
    for name, found in compute(traced, inputs).items():
        assert relative_error(found, expected[name]) < 1e-12
    return traced, context


def load_tiny(model_type: str, folder: Path) -> tuple[Module, dict[str, torch.Tensor]]:
    """A tiny random model, and inputs for it: two sequences, of which the first is padded on the left."""
    module = load_huggingface(save_tiny_checkpoint(model_type, folder))
    ids = random_tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :LEFT_PADDING] = 0
    values = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
        "token_type_ids": torch.zeros_like(ids),
    }
    return module, {name: values[name] for name in module.main.arg_names}
