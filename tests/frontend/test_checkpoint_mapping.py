"""Checkpoints that transformers saved are mapped as transformers loads them, and what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from moec.errors import UnsupportedModelError
from moec.frontend.checkpoint_mapping import CheckpointMapping, map_checkpoint
from moec.frontend.quantized_checkpoint import Quantization, read_quantization_config
from moec.weights.checkpoint import Checkpoint
from moec.weights.context import WeightContext
from moec.weights.expression import Reference
from tests.frontend.tiny_models import TINY_MODELS, save_tiny_checkpoint, tiny_model

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of each architecture that is asked for, made once."""

    class Folders(dict[str, Path]):
        def __missing__(self, model_type: str) -> Path:
            self[model_type] = save_tiny_checkpoint(model_type, tmp_path_factory.mktemp(model_type))
            return self[model_type]

    return Folders()


def _class(folder: Path) -> Any:
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    return AutoModel if TINY_MODELS[model_type].is_encoder else AutoModelForCausalLM


def _empty_model(folder: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model: PreTrainedModel = _class(folder).from_config(config, dtype=torch.float32)
    return model


def _map(folder: Path, **options: Any) -> tuple[CheckpointMapping, WeightContext]:
    checkpoint = Checkpoint.open(folder)
    return map_checkpoint(_empty_model(folder), checkpoint, **options), WeightContext(checkpoint)


def _copy(folder: Path, target: Path, changes: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """Copy config.json with `changes`; the weights are returned for the test to change and save."""
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **(changes or {})}))
    return load_file(folder / WEIGHTS)


def _refused(folder: Path, tensors: dict[str, torch.Tensor]) -> UnsupportedModelError:
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UnsupportedModelError) as caught:
        _map(folder)
    assert caught.value.exit_code == 3 and caught.value.hint
    return caught.value


@pytest.mark.parametrize("model_type", TINY_MODELS)
def test_parameters_are_those_of_from_pretrained(model_type: str, folders: dict[str, Path]) -> None:
    folder = folders[model_type]
    mapping, context = _map(folder)
    expected = _class(folder).from_pretrained(folder, dtype=torch.float32).state_dict()
    assert set(mapping.expressions) == set(expected)
    for name, expression in mapping.expressions.items():
        value = context.load(expression)
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name
        assert len(str(expression)) < 300
        if value.ndim == 3:
            assert torch.equal(context.load(expression, 5), expected[name][5]), name
    count = len(load_file(folder / WEIGHTS))
    assert mapping.summary() == f"{count} of {count} checkpoint tensors used"
    assert set(mapping.used) == set(load_file(folder / WEIGHTS)) and mapping.missing == ()


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_float_types_are_cast(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model(model_type).to(dtype).save_pretrained(tmp_path)
    mapping, context = _map(tmp_path)
    expected = _class(tmp_path).from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    for name, expression in mapping.expressions.items():
        assert str(expression).startswith("cast(") and str(expression).endswith(", f32)")
        assert torch.equal(context.load(expression), expected[name]), name


def test_experts_are_one_short_expression(folders: dict[str, Path]) -> None:
    mapping, _ = _map(folders["mixtral"])
    prefix = "model.layers.1.block_sparse_moe.experts"
    assert str(mapping.expressions["model.layers.1.mlp.experts.gate_up_proj"]) == (
        f"concat(1, stack(0, {prefix}.{{0:8}}.w1.weight), stack(0, {prefix}.{{0:8}}.w3.weight))"
    )


def test_shards_map_like_one_file(folders: dict[str, Path], tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    mapping, context = _map(tmp_path)
    other, other_context = _map(folders["mixtral"])
    assert mapping.expressions == other.expressions
    name = "model.layers.0.mlp.experts.down_proj"
    assert context.digest(mapping.expressions[name]) == other_context.digest(other.expressions[name])


def test_base_model_prefix_is_added_and_removed(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = _copy(folders["llama"], tmp_path)
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, tmp_path / WEIGHTS)
    mapping, _ = _map(tmp_path)
    assert mapping.expressions["model.embed_tokens.weight"] == Reference("embed_tokens.weight")
    bert = _copy(folders["bert"], tmp_path)
    save_file({f"bert.{name}": tensor for name, tensor in bert.items()}, tmp_path / WEIGHTS)
    mapping, _ = _map(tmp_path)
    assert mapping.expressions["embeddings.word_embeddings.weight"] == Reference(
        "bert.embeddings.word_embeddings.weight"
    )


def test_tied_head_is_the_same_expression(folders: dict[str, Path], tmp_path: Path) -> None:
    mapping, _ = _map(folders["llama"])
    assert mapping.expressions["lm_head.weight"] == mapping.expressions["model.embed_tokens.weight"]
    tensors = _copy(folders["llama"], tmp_path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / WEIGHTS)
    mapping, _ = _map(tmp_path)
    assert mapping.expressions["lm_head.weight"] == Reference("model.embed_tokens.weight")
    assert "lm_head.weight" in mapping.used
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / WEIGHTS)
    mapping, _ = _map(tmp_path)
    assert mapping.expressions["model.embed_tokens.weight"] == Reference("lm_head.weight")


def test_tied_but_different_is_refused_unless_untied(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = _copy(folders["llama"], tmp_path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][95, 63] += 1
    error = _refused(tmp_path, tensors)
    assert "lm_head.weight" in error.message and "model.embed_tokens.weight" in error.message
    assert "tie_word_embeddings" in error.hint
    _copy(folders["llama"], tmp_path, {"tie_word_embeddings": False})
    mapping, _ = _map(tmp_path)
    assert mapping.expressions["lm_head.weight"] == Reference("lm_head.weight")


def test_untied_head_that_is_absent_is_missing(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = _copy(folders["llama"], tmp_path, {"tie_word_embeddings": False})
    assert "lm_head.weight" in _refused(tmp_path, tensors).message


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen3", "model.layers.1.self_attn.q_norm.weight"),
        ("deepseek_v3", "model.layers.2.mlp.gate.e_score_correction_bias"),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj_bias"),
        ("gpt2", "transformer.wte.weight"),
    ],
)
def test_missing_tensor_is_named(model_type: str, name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = _copy(folders[model_type], tmp_path)
    del tensors[name]
    assert name in _refused(tmp_path, tensors).message


def test_parameters_that_are_not_required_may_be_missing(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = _copy(folders["bert"], tmp_path)
    gone = ("pooler.dense.weight", "pooler.dense.bias")
    save_file({name: tensor for name, tensor in tensors.items() if name not in gone}, tmp_path / WEIGHTS)
    with pytest.raises(UnsupportedModelError, match=r"pooler\.dense\.weight"):
        _map(tmp_path)
    mapping, _ = _map(tmp_path, required={"embeddings.word_embeddings.weight"})
    assert set(mapping.missing) == set(gone) and "pooler.dense.weight" not in mapping.expressions


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "bert"])
def test_unused_tensor_is_named(model_type: str, folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = _copy(folders[model_type], tmp_path)
    tensors["model.layers.0.extra_adapter.weight"] = torch.zeros(2)
    error = _refused(tmp_path, tensors)
    assert "model.layers.0.extra_adapter.weight" in error.message
    assert f"1 of {len(tensors)} checkpoint tensors" in error.message


def test_layers_beyond_the_config_are_explained(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = _copy(folders["mistral"], tmp_path, {"num_hidden_layers": 1})
    assert "num_hidden_layers = 1" in _refused(tmp_path, tensors).hint


@pytest.mark.parametrize(
    ("model_type", "field", "value"),
    [
        ("mixtral", "num_local_experts", 6),
        ("mixtral", "num_local_experts", 9),
        ("qwen3_moe", "num_local_experts", 4),
        ("gpt_oss", "num_local_experts", 16),
        ("deepseek_v3", "n_routed_experts", 12),
        ("granitemoe", "num_local_experts", 7),
        ("llama", "hidden_size", 32),
        ("llama", "intermediate_size", 100),
        ("qwen3_moe", "moe_intermediate_size", 50),
        ("gpt2", "vocab_size", 97),
    ],
)
def test_config_that_contradicts_the_tensors(
    model_type: str, field: str, value: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    error = _refused(tmp_path, _copy(folders[model_type], tmp_path, {field: value}))
    assert "config.json makes the parameter" in error.message
    assert f"{field} = {value}" in error.hint


def test_expert_of_another_shape_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = _copy(folders["mixtral"], tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
    tensors[name] = tensors[name][:, :-1].contiguous()
    error = _refused(tmp_path, tensors)
    assert name in error.message and "experts.down_proj" in error.where


@pytest.mark.parametrize("renumbered", [False, True])
def test_absent_expert_is_noticed(renumbered: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = _copy(folders["mixtral"], tmp_path)
    for kind in ("w1", "w2", "w3"):
        tensor = tensors.pop(f"model.layers.0.block_sparse_moe.experts.3.{kind}.weight")
        if renumbered:
            tensors[f"model.layers.0.block_sparse_moe.experts.8.{kind}.weight"] = tensor
    error = _refused(tmp_path, tensors)
    assert "without gaps" in error.message and "[3]" in error.message


def test_two_layouts_in_one_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = _copy(folders["mixtral"], tmp_path)
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(8, 192, 64)
    error = _refused(tmp_path, tensors)
    assert "model.layers.0.mlp.experts.gate_up_proj" in error.message and "two layouts" in error.hint


def test_two_names_for_one_parameter(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = _copy(folders["llama"], tmp_path)
    tensors["embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    assert "would both become" in _refused(tmp_path, tensors).message


def test_tables_that_transformers_computes_are_ignored(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = _copy(folders["llama"], tmp_path)
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    save_file({**tensors, **{name: torch.ones(8) for name in names}}, tmp_path / WEIGHTS)
    mapping, _ = _map(tmp_path)
    assert set(mapping.ignored) == set(names)
    assert (
        mapping.summary()
        == f"{len(tensors)} of {len(tensors) + 2} checkpoint tensors used, 2 not weights of this model"
    )


def test_integer_weights_without_quantization_config(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = _copy(folders["llama"], tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    error = _refused(tmp_path, tensors)
    assert name in error.message and "int8" in error.message


def test_packed_weights_without_quantization_config(folders: dict[str, Path], tmp_path: Path) -> None:
    """As GPTQ writes them."""
    tensors = _copy(folders["llama"], tmp_path)
    name = "model.layers.0.mlp.up_proj"
    weight = tensors.pop(f"{name}.weight")
    tensors[f"{name}.qweight"] = torch.zeros(weight.shape[1] // 8, weight.shape[0], dtype=torch.int32)
    error = _refused(tmp_path, tensors)
    assert f"{name}.qweight" in error.message and "not quantised" in (error.hint or "")


def _quantise_fp8(
    tensors: dict[str, torch.Tensor], names: list[str], rows: int, columns: int
) -> dict[str, torch.Tensor]:
    """Replace weights by float8 and block scales; returns the float32 weights that they stand for."""
    meant = {}
    for name in names:
        weight = tensors[name]
        scale = torch.zeros(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        packed = torch.zeros_like(weight)
        meant[name] = torch.zeros_like(weight)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
                scale[i, j] = weight[block].abs().max() / 448
                packed[block] = (weight[block] / scale[i, j]).to(torch.float8_e4m3fn).float()
                meant[name][block] = packed[block] * scale[i, j]
        tensors[name] = packed.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    return meant


def _linear_names(tensors: dict[str, torch.Tensor]) -> list[str]:
    kinds = ("_proj.weight", "_a_proj_with_mqa.weight")
    return [name for name in tensors if name.endswith(kinds)]


FP8 = {"quant_method": "fp8", "weight_block_size": [20, 28], "activation_scheme": "dynamic", "fmt": "e4m3"}


def test_deepseek_fp8_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = _copy(folders["deepseek_v3"], tmp_path, {"quantization_config": FP8})
    meant = _quantise_fp8(tensors, _linear_names(tensors), 20, 28)
    save_file(tensors, tmp_path / WEIGHTS)
    mapping, context = _map(tmp_path)
    assert set(mapping.used) == set(tensors)
    experts = "model.layers.2.mlp.experts"
    text = str(mapping.expressions[f"{experts}.gate_up_proj"])
    assert text.startswith(f"concat(1, stack(0, fp8_block({experts}.{{0:8}}.gate_proj.weight, ")
    gate_up = [
        torch.cat([meant[f"{experts}.{k}.gate_proj.weight"], meant[f"{experts}.{k}.up_proj.weight"]]) for k in range(8)
    ]
    assert torch.equal(context.load(text), torch.stack(gate_up))
    assert torch.equal(context.load(text, 6), gate_up[6])
    for name in ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "model.layers.0.mlp.down_proj.weight"):
        assert torch.equal(context.load(mapping.expressions[name]), meant[name])
    assert str(mapping.expressions["lm_head.weight"]) == "lm_head.weight"


def test_quantization_config_may_be_given_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = _copy(folders["llama"], tmp_path)
    _quantise_fp8(tensors, ["model.layers.0.mlp.up_proj.weight"], 20, 28)
    assert "no quantization_config" in _refused(tmp_path, tensors).message
    mapping, _ = _map(tmp_path, quantization_config=FP8)
    assert "fp8_block" in str(mapping.expressions["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("fault", ["no scales", "transposed scales", "scales alone", "not float8"])
def test_inconsistent_fp8_checkpoint(fault: str, folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = _copy(folders["llama"], tmp_path, {"quantization_config": FP8})
    name = "model.layers.0.mlp.up_proj.weight"
    scale = f"{name}_scale_inv"
    _quantise_fp8(tensors, [name], 20, 28)
    if fault == "no scales":
        del tensors[scale]
    elif fault == "transposed scales":
        tensors[scale] = tensors[scale].T.contiguous()
    elif fault == "scales alone":
        del tensors[name]
    else:
        tensors[name] = tensors[name].float()
    assert name in _refused(tmp_path, tensors).message


def _pack_mxfp4(experts: int, rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random blocks and scales, and the float32 tensor [experts, columns, rows] that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 126, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    nibbles = torch.stack([blocks % 16, blocks // 16], dim=-1).long()
    values = torch.where(nibbles < 8, 1.0, -1.0) * magnitudes[nibbles % 8]
    values = values.flatten(-2) * torch.exp2(scales.float() - 127)[..., None]
    return blocks, scales, values.flatten(-2).transpose(1, 2).contiguous()


def _mxfp4_checkpoint(folder: Path, target: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    tensors = _copy(folder, target, {"quantization_config": config})
    meant = {}
    for seed, name in enumerate([name for name in tensors if name.endswith(("gate_up_proj", "experts.down_proj"))]):
        experts, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"], meant[name] = _pack_mxfp4(experts, rows, columns, seed)
    return tensors, meant


def test_gpt_oss_mxfp4_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors, meant = _mxfp4_checkpoint(folders["gpt_oss"], tmp_path)
    assert len(meant) == 4
    save_file(tensors, tmp_path / WEIGHTS)
    mapping, context = _map(tmp_path)
    assert set(mapping.used) == set(tensors)
    for name, value in meant.items():
        expression = mapping.expressions[name]
        assert str(expression) == f"mxfp4({name}_blocks, {name}_scales)"
        assert torch.equal(context.load(expression), value)
        assert torch.equal(context.load(expression, 3), value[3])


@pytest.mark.parametrize("fault", ["no scales", "no blocks", "both"])
def test_inconsistent_mxfp4_checkpoint(fault: str, folders: dict[str, Path], tmp_path: Path) -> None:
    tensors, meant = _mxfp4_checkpoint(folders["gpt_oss"], tmp_path)
    name = next(iter(meant))
    if fault == "both":
        tensors[name] = meant[name]
    else:
        del tensors[f"{name}_{fault.removeprefix('no ')}"]
    assert name in _refused(tmp_path, tensors).message


def test_mxfp4_without_a_packed_tensor(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = _copy(folders["gpt_oss"], tmp_path, {"quantization_config": {"quant_method": "mxfp4"}})
    error = _refused(tmp_path, tensors)
    assert "mxfp4" in error.message and "do not belong together" in (error.hint or "")


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors"},
        {"bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": None},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"},
    ],
    ids=str,
)
def test_other_quantisations_are_refused_by_name(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="quantised") as caught:
        read_quantization_config(config, "config.json")
    assert str(config.get("quant_method", "no quant_method")) in caught.value.message
    assert "quantization_config" in caught.value.where


def test_known_quantisations_also_as_objects_of_transformers() -> None:
    from transformers import FineGrainedFP8Config, Mxfp4Config

    assert read_quantization_config(Mxfp4Config(), "").kind is Quantization.MXFP4
    scheme = read_quantization_config(FineGrainedFP8Config(weight_block_size=(128, 64)), "")
    assert scheme.kind is Quantization.FP8_BLOCK and scheme.block_size == (128, 64)
    assert read_quantization_config(None, "").kind is Quantization.NONE
