"""Models without weights: nothing is allocated, and what no checkpoint holds is computed."""

from __future__ import annotations

import resource
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM

from moec.errors import UnsupportedModelError
from moec.frontend.empty_model import non_persistent_buffers
from tests.frontend.tiny_models import empty_model, tiny_config


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}}),
        ("gemma3_text", {}),
        ("gpt2", {}),
    ],
)
def test_computed_buffers_are_those_of_the_real_model(model_type: str, changes: dict[str, Any]) -> None:
    empty = empty_model(model_type, **changes).model
    real = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), dtype=torch.float32)
    expected = {name: owner._buffers[short] for owner, short, name in non_persistent_buffers(real)}
    found = {name: owner._buffers[short] for owner, short, name in non_persistent_buffers(empty)}
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert value is not None
        assert torch.equal(found[name], value)  # type: ignore[arg-type]


def test_parameters_are_fake_and_tied_ones_are_one() -> None:
    model = empty_model("llama").model
    assert all(isinstance(parameter, FakeTensor) and parameter.device.type == "cpu" for parameter in model.parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_model_of_a_trillion_parameters_takes_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = empty_model("mixtral", hidden_size=8192, intermediate_size=1 << 20, num_local_experts=256).model
    assert sum(parameter.numel() for parameter in model.parameters()) > 10**13
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


def test_more_parameters_than_any_model_are_refused() -> None:
    with pytest.raises(UnsupportedModelError):
        empty_model(
            "llama", hidden_size=1 << 32, intermediate_size=1 << 32, num_attention_heads=1, num_key_value_heads=1
        )


def test_bodies_of_equal_experts_are_traced_once() -> None:
    model = empty_model("mixtral").model
    digests = {module._moec_expert_body for module in model.modules() if hasattr(module, "_moec_expert_body")}
    assert len(digests) == 1
