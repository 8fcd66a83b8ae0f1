"""config.json read with suspicion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moec.errors import MoecError, UnsafeInputError, UnsupportedModelError, UsageError
from moec.frontend.model_config import check_config, read_config, resolve_model
from tests.frontend.tiny_models import tiny_config


def _config(model_type: str = "mixtral", **changes: Any) -> dict[str, Any]:
    values = json.loads(tiny_config(model_type).to_json_string(use_diff=False))
    names = {"mixtral": "MixtralForCausalLM", "bert": "BertModel", "llama": "LlamaForCausalLM"}
    return {**values, "architectures": [names[model_type]], **changes}


def _write(folder: Path, text: str) -> Path:
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"auto_map": {"AutoModel": "modeling.Evil"}}, UnsafeInputError, "auto_map"),
        ({"text_config": {"auto_map": {"AutoModel": "x.Y"}}}, UnsafeInputError, "auto_map"),
        ({"_attn_implementation": "kernels-community/flash-attn"}, UnsafeInputError, "kernels-community"),
        ({"hidden_size": 10**18}, UnsafeInputError, "hidden_size"),
        ({"rope_parameters": {"factor": 10**18}}, UnsafeInputError, "factor"),
        ({"num_hidden_layers": 10**6}, UnsafeInputError, "num_hidden_layers"),
        ({"num_experts_per_tok": 9}, UnsupportedModelError, "9 experts per token"),
    ],
)
def test_dangerous_or_contradictory(
    changes: dict[str, Any], error: type[MoecError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words) as caught:
        read_config(_write(tmp_path, json.dumps(_config(**changes))))
    assert str(tmp_path / "config.json") in caught.value.where


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1', "[" * 100_000, '{"a":' * 500 + "1" + "}" * 500])
def test_malformed_json(text: str, tmp_path: Path) -> None:
    with pytest.raises(UnsafeInputError):
        read_config(_write(tmp_path, text))


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json"):
        read_config(tmp_path)


def test_numbers_that_json_lacks(tmp_path: Path) -> None:
    read = read_config(_write(tmp_path, '{"limit": [0.0, {"__float__": "Infinity"}], "other": {"__float__": 3}}'))
    assert read == {"limit": [0.0, float("inf")], "other": {"__float__": 3}}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (_config(model_type="mixtral", architectures=["MixtralForSequenceClassificationX"]), "no model class"),
        (_config(architectures=["LlamaForCausalLM"]), "not a model of model_type"),
        (_config(architectures=["__import__('os')"]), "no model class"),
        (_config(architectures=["AutoModel"]), "no model class"),
        ({**_config(), "model_type": "mixtrall"}, "mixtrall"),
        ({**_config(), "model_type": 7}, "unknown model_type"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "encoder-decoder"),
        (_config(num_attention_heads="four"), "refuses this config"),
    ],
)
def test_not_a_model_of_transformers(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        resolve_model(values, "config.json")


def test_nearest_model_type_is_suggested() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        resolve_model({"model_type": "mixtrall"}, "config.json")
    assert "'mixtral'" in caught.value.hint


@pytest.mark.parametrize(
    ("model_type", "architectures", "name", "is_decoder"),
    [
        ("mixtral", ["MixtralForCausalLM"], "MixtralForCausalLM", True),
        ("llama", None, "LlamaForCausalLM", True),
        ("bert", ["BertModel"], "BertModel", False),
        ("bert", ["BertForMaskedLM"], "BertForMaskedLM", False),
        ("bert", None, "BertForMaskedLM", False),
    ],
)
def test_class_of_the_model(model_type: str, architectures: list[str] | None, name: str, is_decoder: bool) -> None:
    source = resolve_model(_config(model_type, architectures=architectures), "config.json")
    assert (source.model_class.__name__, source.is_decoder) == (name, is_decoder)


def test_sizes_that_are_large_but_real() -> None:
    check_config(_config(max_position_embeddings=10_485_760, vocab_size=262_144), "config.json")


def test_two_names_of_one_setting() -> None:
    """transformers knows `num_experts` of Mixtral as another name of `num_local_experts`."""
    values = _config()
    assert resolve_model({**values, "num_experts": values["num_local_experts"]}, "config.json").is_decoder
    with pytest.raises(UnsupportedModelError, match="num_experts = 5 contradicts num_local_experts = 8"):
        resolve_model({**values, "num_experts": 5}, "config.json")
