"""Neurons of dropped experts in experts that stay."""

from __future__ import annotations

import pytest
import torch

from moec.passes.merging import ClusterStart, NeuronTable, Recombined, recombine, segment_directions
from moec.passes.merging.recombination import spherical_k_means
from tests.numerics.expert_tensors import permuted, random_expert

ROWS = torch.randn(40, 8, generator=torch.Generator().manual_seed(99))


def recombined(
    staying: list[NeuronTable | None],
    dropped: list[NeuronTable],
    tau: float,
    importance: float = 0.2,
    start: ClusterStart = ClusterStart.OWN,
) -> Recombined:
    return recombine(
        staying,
        dropped,
        [0.8] * len(staying),
        [importance] * len(dropped),
        tau=tau,
        use_gate=False,
        start=start,
        generator=torch.Generator().manual_seed(0),
    )


def test_a_threshold_above_all_similarities_moves_nothing() -> None:
    tables = [NeuronTable.of(random_expert(seed)) for seed in range(4)]
    result = recombined(tables[:2], tables[2:], 1.0)
    assert result.tables == (None, None)
    assert int(result.received.sum()) == 0


@pytest.mark.parametrize("start", [ClusterStart.OWN, ClusterStart.LARGEST])
@pytest.mark.parametrize("bias", [False, True])
def test_a_duplicate_is_recombined_without_loss(start: ClusterStart, bias: bool) -> None:
    expert = random_expert(0, bias=bias)
    copy = permuted(expert, torch.randperm(12, generator=torch.Generator().manual_seed(1)))
    tables = [NeuronTable.of(item) for item in (random_expert(1, bias=bias), expert)]
    result = recombined(list(tables), [NeuronTable.of(copy)], 0.9, start=start)
    assert result.received.tolist() == [[0, 12]]
    assert result.tables[0] is None and result.tables[1] is not None
    torch.testing.assert_close(result.tables[1].expert().apply(ROWS), expert.apply(ROWS), rtol=0, atol=1e-5)


def test_every_neuron_is_received_where_the_threshold_is_low() -> None:
    tables = [NeuronTable.of(random_expert(seed, width=width)) for seed, width in ((0, 12), (1, 6), (2, 9))]
    result = recombined(list(tables[:2]), tables[2:], -1.0)
    assert int(result.received.sum()) == 9
    widths = [table.width for table in result.tables if table is not None]
    assert widths == [width for width, count in zip((12, 6), result.received[0].tolist(), strict=True) if count]


def test_experts_that_must_not_change_receive_nothing() -> None:
    tables = [NeuronTable.of(random_expert(seed)) for seed in (0, 1)]
    result = recombined([None, tables[1]], [tables[0]], 0.0)
    assert result.received[0, 0] == 0 and result.tables[0] is None


def test_other_activations_receive_nothing() -> None:
    gated, plain = NeuronTable.of(random_expert(0)), NeuronTable.of(random_expert(0, gated=False))
    assert int(recombined([gated], [plain], -1.0).received.sum()) == 0


def test_importance_weighs_the_means() -> None:
    first, second = (NeuronTable.of(random_expert(seed, width=1)) for seed in (0, 1))
    result = recombined([first], [second], -1.0)
    assert result.tables[0] is not None
    torch.testing.assert_close(result.tables[0].up, 0.8 * first.up + 0.2 * second.up)


def test_random_starts_repeat_with_the_seed() -> None:
    tables = [NeuronTable.of(random_expert(seed)) for seed in range(3)]
    results = [recombined(tables[:1], tables[1:], -1.0, start=ClusterStart.RANDOM).tables[0] for _ in range(2)]
    assert results[0] is not None and results[1] is not None
    assert torch.equal(results[0].up, results[1].up)


def test_zero_neurons_are_no_trouble() -> None:
    table = NeuronTable.of(random_expert(0))
    silent = NeuronTable(table.activation, table.gate, torch.zeros_like(table.up), torch.zeros_like(table.down), None)
    assert bool(torch.isfinite(segment_directions(silent, True)).all())
    result = recombined([table], [silent], -1.0, importance=0.0)
    assert result.tables[0] is not None and bool(torch.isfinite(result.tables[0].up).all())


def test_clusters_that_run_empty_are_filled() -> None:
    directions = torch.eye(4, dtype=torch.float64)[[0, 0, 0, 1, 2]]
    labels = spherical_k_means(directions, torch.ones(5, dtype=torch.float64), torch.tensor([0, 1, 2]))
    assert sorted(set(labels.tolist())) == [0, 1, 2]
    assert labels[3] != labels[4]
