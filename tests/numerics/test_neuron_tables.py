"""Alignment and merging on tensors: what must be the identity is the identity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moec.experts import Constant, Dense, FeedForward, LowRank, Projection
from moec.passes.merging import (
    NeuronTable,
    UnmergeableExpertError,
    activation_profit,
    align,
    merge_tables,
    weight_profit,
)
from tests.numerics.expert_tensors import permuted, random_expert

ROWS = torch.randn(40, 8, generator=torch.Generator().manual_seed(99))
SHUFFLE = torch.randperm(12, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_a_table_is_the_expert(bias: bool, gated: bool) -> None:
    expert = random_expert(0, bias=bias, gated=gated)
    again = NeuronTable.of(expert).expert()
    assert torch.equal(again.apply(ROWS), expert.apply(ROWS))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("by", ["weight", "activation"])
def test_a_permuted_copy_merges_to_the_expert_iff_it_is_aligned(bias: bool, gated: bool, by: str) -> None:
    expert = random_expert(1, bias=bias, gated=gated)
    copy = permuted(expert, SHUFFLE)
    torch.testing.assert_close(copy.apply(ROWS), expert.apply(ROWS), rtol=0, atol=1e-5)
    first, second = NeuronTable.of(expert), NeuronTable.of(copy)
    if by == "weight":
        profit = weight_profit(first, second)
    else:
        profit = activation_profit(expert.hidden_activations(ROWS), copy.hidden_activations(ROWS))
    aligned = merge_tables([first, second.take(align(profit))], [0.3, 0.7]).expert()
    torch.testing.assert_close(aligned.apply(ROWS), expert.apply(ROWS), rtol=0, atol=1e-5)
    plain = merge_tables([first, second], [0.3, 0.7]).expert()
    assert (plain.apply(ROWS) - expert.apply(ROWS)).abs().max() > 0.1


def test_aligning_an_expert_with_itself_changes_nothing() -> None:
    table = NeuronTable.of(random_expert(2))
    assert torch.equal(align(weight_profit(table, table)), torch.arange(12))
    silent = torch.zeros(12, 12, dtype=torch.float64)
    assert torch.equal(align(silent), torch.arange(12))


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.1, 0.2, 0.7], [0.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
def test_identical_experts_merge_to_themselves_bit_by_bit(weights: list[float]) -> None:
    table = NeuronTable.of(random_expert(3, bias=True))
    merged = merge_tables([table] * 3, weights)
    assert all(torch.equal(a, b) for a, b in zip(merged.tensors, table.tensors, strict=True))


def test_weights_are_relative() -> None:
    tables = [NeuronTable.of(random_expert(seed)) for seed in (4, 5)]
    merged = merge_tables(tables, [1.0, 3.0])
    torch.testing.assert_close(merged.down, 0.25 * tables[0].down + 0.75 * tables[1].down)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (random_expert(7, width=10), "widths 10, 12"),
        (random_expert(7, bias=True), "biases"),
        (random_expert(7, gated=False), "activations"),
    ],
    ids=["width", "bias", "activation"],
)
def test_experts_that_differ_are_not_merged(other: FeedForward, reason: str) -> None:
    with pytest.raises(UnmergeableExpertError, match=reason):
        merge_tables([NeuronTable.of(random_expert(6)), NeuronTable.of(other)], [1.0, 1.0])


def test_what_has_no_neurons_or_no_numbers_is_refused() -> None:
    expert = random_expert(8)
    factored = replace(expert, up=Projection(LowRank(torch.ones(12, 2), torch.ones(2, 8))))
    broken = replace(expert, down=Projection(Dense(torch.full((8, 12), torch.nan))))
    assert NeuronTable.of(expert).is_finite and not NeuronTable.of(broken).is_finite
    for item, reason in ((Constant(torch.ones(8)), "constant"), (factored, "factored")):
        with pytest.raises(UnmergeableExpertError, match=reason):
            NeuronTable.of(item)
