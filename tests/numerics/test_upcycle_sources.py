"""upcycle of several models: experts are theirs, the rest is their mean, and equal models stay what they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moec
from moec.dialects.builtin import WeightOp
from moec.dialects.moe import RouteOp
from moec.dialects.nn import AttentionOp
from moec.errors import UsageError
from moec.experts import FeedForward, find_moe_layers, load_expert
from moec.module import Module
from moec.weights.expression import Stored
from moec.weights.expression_parser import parse_expression
from tests.experts.models import difference, output
from tests.numerics.several_models import changed, several

EXACT = 1e-9


@pytest.fixture(scope="module")
def equal(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return several("llama", tmp_path_factory.mktemp("equal"), equal=True)


@pytest.fixture(scope="module")
def different(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return several("llama", tmp_path_factory.mktemp("different"), equal=False)


def upcycled(source: Module, options: str, seed: int = 0) -> Module:
    return changed(source, f"upcycle{{{options}}},dce", seed)


FORMS = ("soft-experts", "soft-experts-shared-kv")
OPTIONS = (
    "sources=all rest=average",
    "sources=all rest=average attention=soft-experts",
    "sources=all rest=average attention=soft-experts-shared-kv",
    "sources=others k=1 attention=soft-experts-shared-kv",
)


@pytest.mark.parametrize("options", OPTIONS)
def test_equal_models_stay_what_they_were(equal: Module, options: str) -> None:
    assert difference(output(equal), output(upcycled(equal, options, seed=1))) < EXACT


@pytest.mark.parametrize("model_type", ["phi", "qwen3"])
def test_biases_parallel_blocks_and_norms_of_queries(model_type: str, tmp_path: Path) -> None:
    module = several(model_type, tmp_path, equal=True)
    before = output(module)
    for attention in FORMS:
        after = upcycled(module, f"sources=all rest=average attention={attention}")
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
    assert attentions(upcycled(different, "sources=all attention=soft-experts-shared-kv")) == before
    assert len(attentions(upcycled(different, "sources=all attention=soft-experts"))) == 3 * len(before)


def test_queries_of_all_models_in_one_attention_are_the_attentions_of_all(tmp_path: Path) -> None:
    """Where only queries and outputs differ, both forms are the same function, and not that of one model."""
    module = several("qwen2", tmp_path, equal=False, only=("q_proj", "o_proj"))
    apart, together = (upcycled(module, f"sources=all attention={form} deviation=1") for form in FORMS)
    assert difference(output(apart), output(together)) < EXACT
    assert difference(output(module), output(together)) > 1e-3


def test_experts_are_bit_equal_and_the_rest_is_the_mean(different: Module) -> None:
    module = upcycled(different, "sources=all rest=average")
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


def test_element_types_of_the_sources_stay(tmp_path: Path) -> None:
    module = several("llama", tmp_path, equal=False, dtype=torch.bfloat16)
    joined = upcycled(module, "sources=all rest=average granularity=2 shared=seed")
    for op in joined.op.walk():
        if isinstance(op, WeightOp):
            # what is read as float32 is stored as it was
            assert ("router" in op.weight_name) != ("cast(" in op.source), op.weight_name
    mean = next(op for op in joined.op.walk() if isinstance(op, WeightOp) and "q_proj" in op.weight_name)
    stored = parse_expression(mean.source).operands[0]
    assert isinstance(stored, Stored) and joined.weights.shape_dtype(stored)[1] is torch.bfloat16
    assert output(joined).isfinite().all()


def test_the_first_model_can_be_the_shared_expert(different: Module) -> None:
    module = upcycled(different, "sources=others shared=seed scale=0")
    assert find_moe_layers(module.op)[0].expert_count == 2
    assert difference(output(different), output(module)) < EXACT


def test_parallel_blocks_read_what_their_attention_reads(different: Module) -> None:
    module = upcycled(different, "sources=all parallel")
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
        module = upcycled(different, "sources=all rest=average layers=0")
        moec.run_passes(module, "upcycle{sources=all rest=average}")
    with pytest.raises(UsageError, match="4 experts cannot be chosen among 3"):
        upcycled(different, "sources=all k=4")


def test_several_models_are_no_one_source_to_learn_from(equal: Module) -> None:
    with pytest.raises(UsageError, match=r"several models have no one distribution to learn(?s:.)*target=text"):
        changed(equal, "tune")
