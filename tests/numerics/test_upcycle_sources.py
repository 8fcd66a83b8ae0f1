"""upcycle of several models: experts are theirs, the rest is their mean, and equal models stay what they were."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PhiConfig, PhiForCausalLM

import moec
from moec.artifact.options import RAISING_PIPELINE
from moec.dialects.builtin import ModuleOp, WeightOp
from moec.dialects.moe import RouteOp
from moec.dialects.nn import AttentionOp
from moec.errors import UsageError
from moec.experts import FeedForward, find_moe_layers, load_expert
from moec.frontend.huggingface import load_huggingface
from moec.module import Module
from moec.weights.store import WeightStore
from tests.experts.models import difference, output
from tests.frontend.tiny_models import VOCABULARY_SIZE, randomise, save_tiny_checkpoint

EXACT = 1e-9


def like(first: Path, folder: Path, seed: int, only: tuple[str, ...] = ("",)) -> Path:
    """A copy of a checkpoint with other weights, where their names contain one of `only`."""
    shutil.copytree(first, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(first / "model.safetensors")
    for name in [name for name in tensors if any(part in name for part in only)]:
        tensor = tensors[name]
        tensors[name] = (tensor + 0.05 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_tiny_phi(folder: Path) -> Path:
    """A model of parallel blocks, whose attention and feed-forward block read one norm; with biases everywhere."""
    config = PhiConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model = PhiForCausalLM(config)
    randomise(model, 0)
    model.save_pretrained(str(folder))
    return folder


def several(model_type: str, folder: Path, *, equal: bool, only: tuple[str, ...] = ("",)) -> Module:
    """A raised module with two models beside it."""
    first = (
        save_tiny_phi(folder / "first") if model_type == "phi" else save_tiny_checkpoint(model_type, folder / "first")
    )
    others = [first, first] if equal else [like(first, folder / str(seed), seed, only) for seed in (1, 2)]
    module = load_huggingface(first, WeightStore(folder / "store"), others)
    moec.run_passes(module, RAISING_PIPELINE)
    return module


@pytest.fixture(scope="module")
def equal(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return several("llama", tmp_path_factory.mktemp("equal"), equal=True)


@pytest.fixture(scope="module")
def different(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return several("llama", tmp_path_factory.mktemp("different"), equal=False)


def changed(source: Module, options: str, seed: int = 0) -> Module:
    clone = source.op.clone()
    assert isinstance(clone, ModuleOp)
    module = Module(clone, source.weights, source.source, others=source.others)
    moec.run_passes(module, f"upcycle{{{options}}},dce", seed=seed)
    return module


FORMS = ("soft-experts", "soft-experts-shared-kv")
OPTIONS = (
    "sources=all rest=average",
    "sources=all rest=average attention=soft-experts",
    "sources=all rest=average attention=soft-experts-shared-kv",
    "sources=others k=1 attention=soft-experts-shared-kv",
)


@pytest.mark.parametrize("options", OPTIONS)
def test_equal_models_stay_what_they_were(equal: Module, options: str) -> None:
    for seed in (0, 1):
        assert difference(output(equal), output(changed(equal, options, seed))) < EXACT


@pytest.mark.parametrize("model_type", ["phi", "qwen3"])
def test_biases_parallel_blocks_and_norms_of_queries(model_type: str, tmp_path: Path) -> None:
    module = several(model_type, tmp_path, equal=True)
    before = output(module)
    for attention in FORMS:
        after = changed(module, f"sources=all rest=average attention={attention}")
        assert difference(before, output(after)) < EXACT
        assert len([op for op in after.op.walk() if isinstance(op, RouteOp)]) == len(find_moe_layers(after.op)) > 0
        heads = {op.query.type.shape[1] for op in after.op.walk() if isinstance(op, AttentionOp)}  # type: ignore[attr-defined]
        old = {op.query.type.shape[1] for op in module.op.walk() if isinstance(op, AttentionOp)}  # type: ignore[attr-defined]
        assert heads == ({3 * size for size in old} if "shared" in attention else old)


def test_the_cache_does_not_grow_where_keys_and_values_are_shared(different: Module) -> None:
    def attentions(module: Module) -> list[tuple[object, object]]:
        found = [op for op in module.op.walk() if isinstance(op, AttentionOp)]
        return [(op.key.type, op.value.type) for op in found]

    before = attentions(different)
    assert attentions(changed(different, "sources=all attention=soft-experts-shared-kv")) == before
    assert len(attentions(changed(different, "sources=all attention=soft-experts"))) == 3 * len(before)


def test_queries_of_all_models_in_one_attention_are_the_attentions_of_all(tmp_path: Path) -> None:
    """Where only queries and outputs differ, both forms are the same function, and not that of one model."""
    module = several("qwen2", tmp_path, equal=False, only=("q_proj", "o_proj"))
    apart, together = (changed(module, f"sources=all attention={form} deviation=1") for form in FORMS)
    assert difference(output(apart), output(together)) < EXACT
    assert difference(output(module), output(together)) > 1e-3


def test_experts_are_bit_equal_and_the_rest_is_the_mean(different: Module) -> None:
    module = changed(different, "sources=all rest=average")
    paths = [different.source.folder, *[other.folder for other in different.others]]
    tensors = [load_file(path / "model.safetensors") for path in paths if path is not None]
    for place, layer in enumerate(find_moe_layers(module.op)):
        assert (layer.expert_count, layer.top_k) == (3, 2)
        for number in range(3):
            expert = load_expert(layer, module.weights, number)
            assert isinstance(expert, FeedForward)
            assert torch.equal(expert.up.dense(), tensors[number][f"model.layers.{place}.mlp.up_proj.weight"].float())
    for op in module.op.walk():
        if isinstance(op, WeightOp) and op.weight_name in tensors[0]:
            name = op.weight_name
            mean = (tensors[0][name].float() + tensors[1][name].float() + tensors[2][name].float()) / 3
            found = module.weights.load(op.source)
            assert torch.equal(found, mean.to(tensors[0][name].dtype)), name
            assert found.dtype == tensors[0][name].dtype
    stacks = [op.source for op in module.op.walk() if isinstance(op, WeightOp) and ".class_" in op.weight_name]
    assert len(stacks) == 3 * len(find_moe_layers(module.op)) and not any("stored" in source for source in stacks)


def test_the_first_model_can_be_the_shared_expert(different: Module) -> None:
    module = changed(different, "sources=others shared=seed scale=0")
    assert find_moe_layers(module.op)[0].expert_count == 2
    assert difference(output(different), output(module)) < EXACT


def test_parallel_blocks_read_what_their_attention_reads(different: Module) -> None:
    module = changed(different, "sources=all parallel")
    assert difference(output(different), output(module)) > 1e-3
    for layer in find_moe_layers(module.op):
        rows = layer.experts.x.defining_op
        assert rows is not None
        norm = rows.operands[0].defining_op
        assert norm is not None
        attention = next(op for op in norm.operands[0].users if op.name == norm.name and op is not norm)
        assert any(user.name == "aten.linear.default" for user in attention.results[0].users)


def test_weights_that_a_pass_computed_have_no_counterpart(different: Module) -> None:
    with pytest.raises(UsageError, match="have none like it"):
        module = changed(different, "sources=all rest=average layers=0")
        moec.run_passes(module, "upcycle{sources=all rest=average}")
    with pytest.raises(UsageError, match="4 experts cannot be chosen among 3"):
        changed(different, "sources=all k=4")
