"""Models without weights: nothing is allocated, and what no checkpoint holds is computed."""

from __future__ import annotations

import json
import resource
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM

from moec.errors import UnsupportedModelError
from moec.frontend.empty_model import EmptyModel, build_empty_model, non_persistent_buffers
from moec.frontend.model_config import resolve_model
from tests.frontend.tiny_models import tiny_config


def _empty(model_type: str, **changes: Any) -> EmptyModel:
    config = tiny_config(model_type, **changes)
    values = json.loads(config.to_json_string(use_diff=False))
    name = AutoModelForCausalLM._model_mapping[type(config)].__name__
    return build_empty_model(resolve_model({**values, "architectures": [name]}, "config.json"))


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
    empty = _empty(model_type, **changes).model
    real = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), dtype=torch.float32)
    expected = {name: owner._buffers[short] for owner, short, name in non_persistent_buffers(real)}
    found = {name: owner._buffers[short] for owner, short, name in non_persistent_buffers(empty)}
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert value is not None
        assert torch.equal(found[name], value)  # type: ignore[arg-type]


def test_parameters_are_fake_and_tied_ones_are_one() -> None:
    model = _empty("llama").model
    assert all(isinstance(parameter, FakeTensor) and parameter.device.type == "cpu" for parameter in model.parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_model_of_a_trillion_parameters_takes_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = _empty("mixtral", hidden_size=8192, intermediate_size=1 << 20, num_local_experts=256).model
    assert sum(parameter.numel() for parameter in model.parameters()) > 10**13
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


def test_more_parameters_than_any_model_are_refused() -> None:
    with pytest.raises(UnsupportedModelError):
        _empty("llama", hidden_size=1 << 32, intermediate_size=1 << 32, num_attention_heads=1, num_key_value_heads=1)


def test_bodies_of_equal_experts_are_traced_once() -> None:
    model = _empty("mixtral").model
    digests = {module._moec_expert_body for module in model.modules() if hasattr(module, "_moec_expert_body")}
    assert len(digests) == 1
