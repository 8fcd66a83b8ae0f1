"""Layers of one kind are recognised, so that the computation of their experts is traced once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

import moec.frontend.empty_model
from moec.frontend.expert_body import trace_stacked_experts
from moec.frontend.hooks import BODY_ATTRIBUTE
from moec.frontend.same_computation import same_computation
from tests.frontend.tiny_models import empty_model


class _Block(nn.Module):
    def __init__(self, width: int = 4, activation: str = "silu", limit: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, device="meta"))
        self.activation = ACT2FN[activation]
        self.limits = [limit]


class _Derived(_Block):
    pass


def _with_buffer() -> nn.Module:
    block = _Block()
    block.register_buffer("offset", torch.ones(1))
    return block


def _with_function(function: Callable[[float], float]) -> nn.Module:
    block = _Block()
    block.function = function
    return block


def test_the_values_of_parameters_do_not_matter() -> None:
    first, second = _Block(), _Block()
    second.weight = nn.Parameter(torch.ones(4, 3))
    assert same_computation(first, second)
    assert same_computation(_with_function(abs), _with_function(abs))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (_Block(), _Derived()),
        (_Block(), _Block(width=5)),
        (_Block(), _Block(activation="relu")),
        (_Block(), _Block(limit=2.0)),
        (_Block(), _Block().eval()),
        (_Block(), _with_buffer()),
        (_with_buffer(), _with_buffer()),
        (_with_function(abs), _with_function(round)),
        (nn.Sequential(_Block(), nn.ReLU()), nn.Sequential(nn.ReLU(), _Block())),
    ],
    ids=["class", "shape", "activation", "number", "mode", "one buffer", "buffers", "function", "order"],
)
def test_all_else_does(first: nn.Module, second: nn.Module) -> None:
    assert not same_computation(first, second)


def test_experts_of_equal_layers_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[str] = []

    def trace(module: nn.Module, name: str) -> object:
        traced.append(name)
        return trace_stacked_experts(module, name)

    monkeypatch.setattr(moec.frontend.empty_model, "trace_stacked_experts", trace)
    model = empty_model("qwen3_moe", num_hidden_layers=3).model
    bodies = [getattr(part, BODY_ATTRIBUTE) for part in model.modules() if hasattr(part, BODY_ATTRIBUTE)]
    assert len(bodies) == 3
    assert traced == ["model.layers.0.mlp.experts"]
    assert set(bodies) == {trace_stacked_experts(model.model.layers[2].mlp.experts, "again").digest}
