"""Checkpoints written from the IR: transformers loads them and computes what the IR computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

import moec
from moec.artifact.options import CheckpointDType
from moec.codegen.huggingface.fields import number_fields, with_field
from moec.dialects.moe import RouteOp
from moec.dialects.nn import RMSNormOp
from moec.errors import UnsupportedModelError, UsageError
from moec.experts import Constant, alias_experts, replace_experts, slice_experts
from moec.module import Module
from tests.codegen.checkpoints import (
    BOUND,
    Source,
    difference,
    experts_of,
    factored,
    layers,
    load_source,
    narrowed,
    tensors_of,
    write,
)
from tests.frontend.tiny_models import HIDDEN_SIZE, TINY_MODELS, save_tiny_checkpoint, tiny_model

pytestmark = pytest.mark.xdist_group("checkpoints")

FAST = ("llama", "mixtral", "gpt_oss")
BOTH_LAYOUTS = pytest.mark.parametrize("model_type", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
"""Gate and up one after the other, and transposed, interleaved and with biases."""


class Sources:
    """One loaded checkpoint of each architecture that is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, Source] = {}

    def __getitem__(self, model_type: str) -> Source:
        if model_type not in self._known:
            folder = save_tiny_checkpoint(model_type, self._folder / model_type)
            self._known[model_type] = load_source(folder, self._folder / "store")
        return self._known[model_type]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("checkpoints"))


def config_of(folder: Path) -> dict[str, object]:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values


@pytest.mark.parametrize(
    "model_type", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in TINY_MODELS]
)
def test_an_unchanged_model_comes_back_bit_by_bit(model_type: str, sources: Sources, tmp_path: Path) -> None:
    source = sources[model_type]
    out = tmp_path / "out"
    report = write(source, source.edited(), out)
    before, after = tensors_of(source.folder), tensors_of(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert not report.config_changes and not report.changes
    assert difference(out, source.raised) < BOUND


def test_a_module_that_no_pass_has_touched_and_equal_bytes(sources: Sources, tmp_path: Path) -> None:
    source = sources["mixtral"]
    for name, module in (("traced", source.traced), ("raised", source.raised)):
        moec.write_checkpoint(module, tmp_path / name)
    for path in (tmp_path / "traced").iterdir():
        assert path.read_bytes() == (tmp_path / "raised" / path.name).read_bytes()


def test_fewer_experts(sources: Sources, tmp_path: Path) -> None:
    source, out = sources["mixtral"], tmp_path / "out"
    module = source.edited()
    for layer in layers(module):
        slice_experts(layer, [0, 2, 3, 6, 7])
    report = write(source, module, out)
    assert report.config_changes == {"num_local_experts": (8, 5)}
    assert report.nbytes < report.source_nbytes
    assert difference(out, module) < BOUND
    old = "model.layers.1.block_sparse_moe.experts.6.w2.weight"
    new = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    assert torch.equal(tensors_of(out)[new], tensors_of(source.folder)[old])


@BOTH_LAYOUTS
def test_narrower_experts_in_fewer_numbers(model_type: str, sources: Sources, tmp_path: Path) -> None:
    source, out = sources[model_type], tmp_path / "out"
    module = source.edited()
    for layer in layers(module):
        fewer = slice_experts(layer, [1, 4, 5])
        experts = {number: narrowed(expert, 32) for number, expert in experts_of(fewer, module).items()}
        replace_experts(fewer, module.weights, experts)
    report = write(source, module, out)
    assert report.config_changes == {"intermediate_size": (96, 32), "num_local_experts": (8, 3)}
    assert not report.changes
    assert difference(out, module) < BOUND


def test_another_number_of_experts_per_token(sources: Sources, tmp_path: Path) -> None:
    source = sources["mixtral"]
    module = source.edited()
    moec.run_passes(module, "set-routing{k=1}")
    assert {op.routing.k for op in module.op.walk() if isinstance(op, RouteOp)} == {1}
    report = write(source, module, tmp_path / "out")
    assert report.config_changes == {"num_experts_per_tok": (2, 1)}
    assert difference(tmp_path / "out", module) < BOUND


def ragged(source: Source) -> Module:
    module = source.edited()
    for layer in layers(module):
        experts = experts_of(layer, module)
        replace_experts(
            layer, module.weights, {number: narrowed(experts[number], 9 + 2 * number) for number in experts}
        )
    return module


@BOTH_LAYOUTS
def test_experts_of_unequal_width_are_padded_on_request(model_type: str, sources: Sources, tmp_path: Path) -> None:
    source, out = sources[model_type], tmp_path / "out"
    module = ragged(source)
    with pytest.raises(UnsupportedModelError, match=r"experts alike.*widths from 9 to 23, padded") as refused:
        write(source, module, out)
    assert "--uniform" in refused.value.hint and not out.exists()
    report = write(source, module, out, uniform=True)
    assert report.config_changes == {"intermediate_size": (96, 24)}
    assert [change.place for change in report.changes] == [layer.name for layer in layers(module)]
    assert difference(out, module) < BOUND


def test_a_width_that_transformers_does_not_run_is_padded_on_request(sources: Sources, tmp_path: Path) -> None:
    source = sources["mixtral"]
    module = source.edited()
    for layer in layers(module):
        experts = experts_of(layer, module)
        replace_experts(layer, module.weights, {number: narrowed(experts[number], 37) for number in experts})
    with pytest.raises(UnsupportedModelError, match=r"width 37, padded with zero neurons to 40 .*multiples of 8"):
        write(source, module, tmp_path / "out")
    write(source, module, tmp_path / "out", uniform=True)
    assert difference(tmp_path / "out", module) < BOUND


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ([0, 1, 0, 3, 4, 1, 6, 7], "2 experts are other names"),
        ([0, 1, -1, 3, -1, 5, 6, 7], "2 experts that compute nothing"),
    ],
)
def test_shared_and_empty_experts(stored: list[int], words: str, sources: Sources, tmp_path: Path) -> None:
    source = sources["mixtral"]
    module = source.edited()
    alias_experts(layers(module)[1], stored)
    with pytest.raises(UnsupportedModelError, match=words) as refused:
        write(source, module, tmp_path / "out")
    assert "uniform from the start is" in refused.value.hint
    report = write(source, module, tmp_path / "out", uniform=True)
    assert [change.place for change in report.changes] == [layers(module)[1].name]
    assert report.nbytes == report.source_nbytes
    assert difference(tmp_path / "out", module) < BOUND


def test_factored_experts_are_multiplied_out(sources: Sources, tmp_path: Path) -> None:
    source = sources["mixtral"]
    module = source.edited()
    layer = layers(module)[0]
    experts = experts_of(layer, module)
    replace_experts(layer, module.weights, {number: factored(experts[number], 5) for number in (1, 3)})
    with pytest.raises(UnsupportedModelError, match="2 experts with factored matrices"):
        write(source, module, tmp_path / "out")
    write(source, module, tmp_path / "out", uniform=True)
    assert difference(tmp_path / "out", module) < BOUND
    write(source, module, tmp_path / "half", uniform=True, dtype=CheckpointDType.BFLOAT16)
    assert difference(tmp_path / "half", module, CheckpointDType.BFLOAT16) < BOUND


def test_constant_experts(sources: Sources, tmp_path: Path) -> None:
    value = torch.linspace(-1, 1, HIDDEN_SIZE)
    for model_type in ("mixtral", "gpt_oss"):
        source, out = sources[model_type], tmp_path / model_type
        module = source.edited()
        replace_experts(layers(module)[0], module.weights, {2: Constant(value)})
        if model_type == "mixtral":
            with pytest.raises(UnsupportedModelError, match="constants, for which") as refused:
                write(source, module, out, uniform=True)
            assert "redirect" in refused.value.hint
        else:
            write(source, module, out, uniform=True)
            assert difference(out, module) < BOUND


def test_layers_with_unequal_numbers_of_experts_are_refused(sources: Sources, tmp_path: Path) -> None:
    source = sources["mixtral"]
    module = source.edited()
    for layer, count in zip(layers(module), (6, 5), strict=True):
        slice_experts(layer, range(count))
    for uniform in (False, True):
        with pytest.raises(UnsupportedModelError, match=r"6 in model.layers.0.*5 in model.layers.1") as refused:
            write(source, module, tmp_path / "out", uniform=uniform)
        assert "keep 6 experts in every layer, or 5" in refused.value.hint


@pytest.mark.parametrize("model_type", ["gpt_oss", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_layers_with_fewer_experts_are_filled_up_where_a_bias_can_switch_experts_off(
    model_type: str, sources: Sources, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if model_type == "gpt_oss":  # a bias of the logits
        source = sources[model_type]
    else:  # a bias of the choice alone
        folder = save_tiny_checkpoint(model_type, tmp_path / "source", n_group=1, topk_group=1)
        source = load_source(folder, tmp_path / "store")
    module = source.edited()
    for layer, count in zip(layers(module), (6, 3), strict=True):
        slice_experts(layer, range(count))
    with pytest.raises(UnsupportedModelError, match="different numbers of experts") as refused:
        write(source, module, out)
    assert "--uniform fills the smaller layers up" in refused.value.hint
    report = write(source, module, out, uniform=True)
    assert [new for _, new in report.config_changes.values()] == [6]
    assert [change.text for change in report.changes] == [
        "3 router outputs that are never chosen, so that it has 6",
        "3 experts that compute nothing, written as zeros",
    ]
    assert difference(out, module) < BOUND


def test_other_arithmetic_is_refused_by_its_place(sources: Sources, tmp_path: Path) -> None:
    source = sources["llama"]
    module = source.edited()
    norms = [op for op in module.op.walk() if isinstance(op, RMSNormOp)]
    norms[2].epsilon = 0.5
    with pytest.raises(UnsupportedModelError, match=r"epsilon = 0.5 instead of 1e-06") as refused:
        write(source, module, tmp_path / "out")
    assert refused.value.where.startswith("model.layers.1")


def test_a_torch_module_is_refused(tmp_path: Path) -> None:
    module = moec.load(nn.Linear(4, 4), (torch.zeros(2, 4),))
    with pytest.raises(UsageError, match="torch module"):
        moec.write_checkpoint(module, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_and_their_index(sources: Sources, tmp_path: Path) -> None:
    source, out = sources["mixtral"], tmp_path / "out"
    report = write(source, source.edited(), out, shard_bytes=300_000)
    index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"].values()) == set(report.files) and len(report.files) > 3
    assert report.files[1] == f"model-00002-of-{len(report.files):05}.safetensors"
    assert index["metadata"]["total_size"] == report.nbytes
    assert set(index["weight_map"]) == set(tensors_of(source.folder))
    assert all((out / name).stat().st_size < 310_000 for name in report.files)
    assert difference(out, source.raised) < BOUND
    with pytest.raises(UsageError, match="0 bytes"):
        write(source, source.edited(), tmp_path / "none", shard_bytes=0)


def test_element_types(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    tiny_model("mixtral", num_hidden_layers=1).bfloat16().save_pretrained(str(folder))
    source = load_source(folder, tmp_path / "store")
    report = write(source, source.edited(), tmp_path / "same")
    assert report.dtype == "bfloat16" and report.nbytes == report.source_nbytes
    before, after = tensors_of(folder), tensors_of(tmp_path / "same")
    assert all(torch.equal(before[name], after[name]) for name in before)

    module = source.edited()
    (layer,) = layers(module)
    mean = experts_of(layer, module)[0]
    mean.up.dense().mul_(1 / 3)
    replace_experts(layer, module.weights, {0: mean})
    report = write(source, module, tmp_path / "mixed")
    mixed = tensors_of(tmp_path / "mixed")
    wide = [name for name, tensor in mixed.items() if tensor.dtype == torch.float32]
    assert wide == ["model.layers.0.block_sparse_moe.experts.0.w3.weight"]
    assert report.dtype == "float32" and config_of(tmp_path / "mixed")["dtype"] == "float32"
    assert difference(tmp_path / "mixed", module) < BOUND

    report = write(source, module, tmp_path / "half", dtype=CheckpointDType.BFLOAT16)
    assert report.nbytes == report.source_nbytes
    assert difference(tmp_path / "half", module, CheckpointDType.BFLOAT16) < BOUND
    assert difference(tmp_path / "half", module) > BOUND
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert loaded.dtype == torch.bfloat16


def test_a_quantised_source_is_written_without_its_quantisation(sources: Sources, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(sources["mixtral"].folder, folder)
    tensors = tensors_of(folder)
    name = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(tensors[name].shape, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2, generator=generator)
    tensors[name], tensors[f"{name}_scale_inv"] = packed, scale
    save_file(tensors, folder / "model.safetensors")
    quantised = {"quant_method": "fp8", "weight_block_size": [32, 48], "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps({**config_of(folder), "quantization_config": quantised}))
    source = load_source(folder, tmp_path / "store")
    write(source, source.edited(), tmp_path / "out")
    written = tensors_of(tmp_path / "out")
    meant = packed.float() * scale.repeat_interleave(32, 0).repeat_interleave(48, 1)
    assert torch.equal(written[name], meant) and f"{name}_scale_inv" not in written
    assert "quantization_config" not in config_of(tmp_path / "out")
    assert difference(tmp_path / "out", source.raised) < BOUND


def test_a_tied_head_is_stored_once_and_unused_tensors_are_kept(sources: Sources, tmp_path: Path) -> None:
    write(sources["llama"], sources["llama"].edited(), tmp_path / "llama")
    assert "lm_head.weight" not in tensors_of(tmp_path / "llama")
    write(sources["bert"], sources["bert"].edited(), tmp_path / "bert")
    pooler = "pooler.dense.weight"
    assert torch.equal(tensors_of(tmp_path / "bert")[pooler], tensors_of(sources["bert"].folder)[pooler])


def test_fields_left_at_their_default_and_fields_of_two_names() -> None:
    values: dict[str, object] = {"model_type": "mixtral"}
    fields = {str(field): field for field in number_fields(values)}
    changed = with_field(values, fields["num_local_experts"], 5)
    assert changed == {"model_type": "mixtral", "num_local_experts": 5} and "num_local_experts" not in values
    by_alias = with_field({"model_type": "mixtral", "num_experts": 8}, fields["num_local_experts"], 5)
    assert by_alias == {"model_type": "mixtral", "num_experts": 5}


@pytest.mark.slow
def test_the_width_of_shared_experts_stays(sources: Sources, tmp_path: Path) -> None:
    source = sources["deepseek_v3"]
    module = source.edited()
    for layer in layers(module):
        experts = experts_of(layer, module)
        replace_experts(layer, module.weights, {number: narrowed(experts[number], 24) for number in experts})
    report = write(source, module, tmp_path / "out")
    assert report.config_changes == {"moe_intermediate_size": (48, 24), "n_shared_experts": (1, 2)}
    assert difference(tmp_path / "out", module) < BOUND

    module = ragged(source)
    with pytest.raises(UnsupportedModelError, match=r"width of experts 48 -> 24|experts alike"):
        write(source, module, tmp_path / "ragged")
    write(source, module, tmp_path / "ragged", uniform=True)
    assert difference(tmp_path / "ragged", module) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", ["gpt_oss", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "deepseek_v2"]
)
def test_fewer_experts_of_other_architectures(model_type: str, sources: Sources, tmp_path: Path) -> None:
    source = sources[model_type]
    module = source.edited()
    for layer in layers(module):
        slice_experts(layer, [0, 2, 4, 6] if model_type == "deepseek_v2" else [0, 1, 4, 5, 7])
    report = write(source, module, tmp_path / "out")
    assert [new for _, new in report.config_changes.values()] == [len(layers(module)[0].stored)]
    assert difference(tmp_path / "out", module) < BOUND
