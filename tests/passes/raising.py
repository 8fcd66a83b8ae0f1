"""Runs passes on modules and measures that they still compute the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moec.artifact.options import RAISING_PIPELINE
from moec.frontend.huggingface import load_huggingface
from moec.frontend.torch_export import load_torch
from moec.ir import Operation, Value, verify
from moec.module import Module
from moec.pipeline.base import PassContext
from moec.pipeline.registry import find_pass
from moec.reference.executor import Executor
from moec.rewrite import Refusal
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


class Several(nn.Module):
    """Applies each of its parts to the same x, so that one trace serves many tests."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts.values())

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        # inputs differ, so that parts share nothing
        return [part(x * (1.5 + index)) for index, part in enumerate(self.parts)]


@dataclass(frozen=True)
class Raised:
    """What one part became: the operations that its result needs, how far it is from the trace, and refusals of any
    part."""

    ops: list[Operation]
    error: float
    refusals: list[Refusal]

    def named(self, name: str) -> list[Any]:
        """The operations of one kind."""
        return [op for op in self.ops if op.name == name]

    def names(self) -> set[str]:
        """The kinds of operations."""
        return {op.name for op in self.ops}


def raise_all(parts: Mapping[str, nn.Module], x: torch.Tensor, pipeline: str = RAISING_PIPELINE) -> dict[str, Raised]:
    """Modules of one input [batch, seq, ...] after passes, by name. Their parameters are made random."""
    torch.manual_seed(0)
    module = Several(parts).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    names = [f"result{index}" for index in range(len(parts))]
    traced = load_torch(module, {"x": x}, dynamic={"x": {0: "batch", 1: "seq"}}, result_names=names)
    expected = compute(traced, {"x": x})
    context = apply(traced, pipeline)
    found = compute(traced, {"x": x})
    returned = traced.main.return_op.operands
    return {
        name: Raised(_needed(value), relative_error(found[result], expected[result]), context.refusals)
        for name, value, result in zip(parts, returned, names, strict=True)
    }


def _needed(value: Value) -> list[Operation]:
    """The operations that a value depends on."""
    ops: dict[Operation, None] = {}
    stack = [value]
    while stack:
        op = stack.pop().defining_op
        if op is not None and op not in ops:
            ops[op] = None
            stack.extend(op.operands)
    return list(ops)


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
