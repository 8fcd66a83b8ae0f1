"""Experts of which some neurons are whole and the others factored: written, read back and computed as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moec.experts import (
    FeedForward,
    LowRank,
    PartlyLowRank,
    Projection,
    find_moe_layers,
    load_expert,
    replace_experts,
)
from moec.module import Module
from tests.experts.models import copy_of, difference, output, raised_model

KEPT = 5


@pytest.fixture(scope="module", params=("mixtral", "gpt_oss"))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Module:
    """gpt_oss has biases in all projections."""
    return raised_model(request.param, tmp_path_factory.mktemp(request.param))


def factors(matrix: torch.Tensor, rank: int) -> LowRank:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return LowRank(u[:, :rank] * s[:rank], v[:rank])


def partly(projection: Projection, axis: int, rank: int) -> Projection:
    whole, rest = projection.dense().tensor_split([KEPT], dim=axis)
    return replace(projection, matrix=PartlyLowRank(whole.contiguous(), factors(rest, rank), axis))


def changed(expert: FeedForward, rank: int) -> FeedForward:
    gate = None if expert.gate is None else partly(expert.gate, 0, rank)
    return replace(expert, gate=gate, up=partly(expert.up, 0, rank), down=partly(expert.down, 1, rank))


def test_it_is_read_back_as_it_was_written(source: Module) -> None:
    module = copy_of(source)
    layer = find_moe_layers(module.op)[0]
    new = {}
    for number in range(layer.expert_count):
        expert = load_expert(layer, module.weights, number)
        assert isinstance(expert, FeedForward)
        new[number] = changed(expert, 2)
    layer = replace_experts(layer, module.weights, new)
    assert len(layer.experts.classes) == 1
    rows = torch.randn(6, layer.hidden_size, generator=torch.Generator().manual_seed(0))
    for number, expert in new.items():
        found = load_expert(layer, module.weights, number)
        assert isinstance(found, FeedForward)
        for one, other in ((expert.gate, found.gate), (expert.up, found.up), (expert.down, found.down)):
            assert one is not None and other is not None
            assert isinstance(one.matrix, PartlyLowRank) and isinstance(other.matrix, PartlyLowRank)
            assert (one.matrix.axis, one.matrix.shape) == (other.matrix.axis, other.matrix.shape)
            assert torch.equal(one.matrix.whole, other.matrix.whole)
            assert torch.equal(one.dense(), other.dense())
            assert (one.bias is None) == (other.bias is None)
            assert one.bias is None or (other.bias is not None and torch.equal(one.bias, other.bias))
        dense = torch.nn.functional.linear(rows, expert.up.dense(), expert.up.bias)
        assert torch.allclose(expert.up.apply(rows), dense, atol=1e-5)
        assert torch.allclose(found.apply(rows), expert.apply(rows), atol=1e-5)


def test_at_full_rank_the_model_computes_the_same(source: Module) -> None:
    module = copy_of(source)
    for layer in find_moe_layers(module.op):
        new = {}
        for number in range(layer.expert_count):
            expert = load_expert(layer, module.weights, number, torch.float64)
            assert isinstance(expert, FeedForward)
            new[number] = changed(expert, layer.hidden_size)
        replace_experts(layer, module.weights, new)
    assert difference(output(source), output(module)) < 2e-6


def test_a_part_that_is_missing_is_not_read_as_another_expert(source: Module, tmp_path: Path) -> None:
    module = copy_of(source)
    layer = find_moe_layers(module.op)[0]
    expert = load_expert(layer, module.weights, 0)
    assert isinstance(expert, FeedForward)
    narrow = replace(changed(expert, 2), down=partly(expert.down, 1, 1))
    layer = replace_experts(layer, module.weights, {0: narrow})
    assert len(layer.experts.classes) == 2
    again = load_expert(layer, module.weights, 0)
    assert isinstance(again, FeedForward) and isinstance(again.down.matrix, PartlyLowRank)
    assert again.down.matrix.rest.rank == 1
    assert again.width == expert.width
