"""Dense models that passes gave experts, as checkpoints of architectures that have experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import moec
from moec.artifact.options import CheckpointOptions
from moec.artifact.tokens import function_inputs, token_batch
from moec.codegen.huggingface.emit import HuggingFaceReport, emit_huggingface
from moec.errors import UnsupportedModelError
from moec.frontend.model_kind import ModelKind
from moec.module import Module
from moec.pipeline.recipes import find_recipe
from moec.reference.executor import Executor
from tests.experts.models import calibrate_text, copy_of, difference, output, raised_model

ROUTER = "init-router{kind=random deviation=0.5}"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return raised_model("llama", tmp_path_factory.mktemp("llama"))


def written(
    source: Module, pipeline: str, folder: Path, uniform: bool = False
) -> tuple[Module, HuggingFaceReport, dict[str, object]]:
    module = copy_of(source)
    moec.run_passes(module, pipeline)
    report = emit_huggingface(module, folder, CheckpointOptions(uniform=uniform))
    return module, report, json.loads((folder / "config.json").read_text(encoding="utf-8"))


def error_of(module: Module, folder: Path) -> float:
    """How far the logits of transformers' model are from the IR's, on real tokens."""
    feeds = function_inputs(module.main, token_batch(module, rows=2, length=24))
    with torch.no_grad():
        expected = Executor(module.op, module.weights).run(feeds)["logits"]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found = model(input_ids=feeds["input_ids"], attention_mask=feeds["attention_mask"]).logits
    real = feeds["attention_mask"].bool()
    return difference(expected[real], found[real])


@pytest.mark.parametrize(
    ("pipeline", "model_type", "fields"),
    [
        ("upcycle{experts=4}", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        pytest.param(
            f"factorize{{experts=4}},{ROUTER},set-routing{{k=2 combine=softmax scale=constant factor=1.7}}",
            "mixtral",
            {"intermediate_size": 24},
            marks=pytest.mark.slow,
        ),
        pytest.param("factorize{experts=4}", "mixtral", {"num_experts_per_tok": 4}, marks=pytest.mark.slow),
        pytest.param(
            f"factorize{{experts=4 shared=32}},{ROUTER},set-routing{{k=2 combine=score}}",
            "qwen2_moe",
            {"shared_expert_intermediate_size": 32, "moe_intermediate_size": 16, "norm_topk_prob": False},
            marks=pytest.mark.slow,
        ),
        (
            f"factorize{{experts=4 shared=32}},{ROUTER},set-routing{{k=2 combine=softmax}}",
            "qwen2_moe",
            {"norm_topk_prob": True, "qkv_bias": False},
        ),
    ],
)
def test_experts_of_a_dense_model_are_those_of_an_architecture_with_experts(
    pipeline: str, model_type: str, fields: dict[str, object], llama: Module, tmp_path: Path
) -> None:
    module, report, config = written(llama, pipeline, tmp_path)
    assert config["model_type"] == model_type and config.items() >= fields.items()
    assert config["tie_word_embeddings"] is True and config["rms_norm_eps"] == llama.config["rms_norm_eps"]
    assert "model_type" in report.config_changes and not report.changes
    assert error_of(module, tmp_path) < 1e-5


@pytest.mark.parametrize("k", [2, 4])
def test_the_best_recipe_is_a_mixtral(k: int, llama: Module, tmp_path: Path) -> None:
    recipe = find_recipe("best", ModelKind.DENSE)
    given = {"experts": "4", "k": str(k), "sequences": "16", "length": "32"}
    text = calibrate_text(tmp_path, rows=16).partition("{")[2].partition(" sequences")[0]
    pipeline = recipe.text(settings=given).replace("calibrate{", f"calibrate{{{text} ")
    module, report, config = written(llama, pipeline, tmp_path / "out")
    assert config["model_type"] == "mixtral" and config["num_experts_per_tok"] == k and not report.changes
    assert error_of(module, tmp_path / "out") < 1e-5
    if k == 4:
        assert difference(output(llama), output(module)) < 1e-9


@pytest.mark.slow
def test_layers_that_stay_dense_and_no_shared_block_need_empty_shared_experts(llama: Module, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no architecture of transformers with experts"):
        written(llama, "upcycle{experts=4 every=2}", tmp_path / "refused")
    module, report, config = written(llama, "upcycle{experts=4 every=2}", tmp_path, uniform=True)
    assert config["model_type"] == "qwen2_moe" and config["mlp_only_layers"] == [0]
    assert [change.text for change in report.changes] == ["a shared expert of 8 zero neurons"]
    assert error_of(module, tmp_path) < 1e-5


@pytest.mark.parametrize(
    ("pipeline", "message", "hint"),
    [
        (
            f"factorize{{experts=4}},{ROUTER},set-routing{{k=2}}",
            "2 chosen experts of 4 count in full",
            "combine=softmax spread=",
        ),
        (
            "factorize{experts=4},init-router{kind=random deviation=0.5 bias},set-routing{k=2 combine=softmax}",
            "its router has a bias",
            "init-router{bias=false}",
        ),
        ("upcycle{experts=4},set-routing{combine=score select=top-p p=0.5}", "select = topp", "a number of experts"),
    ],
)
def test_what_no_architecture_says_is_refused_with_the_nearest_that_one_says(
    pipeline: str, message: str, hint: str, llama: Module, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        written(llama, pipeline, tmp_path)
    assert hint in caught.value.hint


@pytest.mark.slow
@pytest.mark.parametrize(("source", "model_type"), [("qwen3", "qwen3_moe"), ("mistral", "mixtral")])
def test_other_sources(source: str, model_type: str, tmp_path: Path) -> None:
    dense = raised_model(source, tmp_path / "source")
    module, _, config = written(dense, "upcycle{experts=4}", tmp_path / "out")
    assert config["model_type"] == model_type
    assert error_of(module, tmp_path / "out") < 1e-5


@pytest.mark.slow
def test_models_with_norms_that_no_host_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no architecture of transformers with experts"):
        written(raised_model("gpt2", tmp_path / "gpt2"), "upcycle{experts=4}", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "pipeline", "fields"),
    [
        ("mixtral", "set-routing{scale=constant factor=1.5}", {}),
        ("qwen3_moe", "set-routing{combine=score}", {"norm_topk_prob": False}),
        ("deepseek_v3", "set-routing{scale=constant factor=2.5}", {"routed_scaling_factor": 2.5}),
    ],
)
def test_scalars_of_routers_are_found_in_the_config_or_carried_by_the_experts(
    source: str, pipeline: str, fields: dict[str, object], tmp_path: Path
) -> None:
    mixture = raised_model(source, tmp_path / "source")
    module, report, config = written(mixture, pipeline, tmp_path / "out")
    assert config.items() >= fields.items()
    assert set(report.config_changes) - {"dtype", "transformers_version"} == set(fields)
    assert error_of(module, tmp_path / "out") < 1e-5
