"""factorize by what neurons do on text: partitions, shared neurons, and what a calibration in front is good for."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import networkx
import pytest
import torch
from scipy.optimize import linear_sum_assignment

import moec
from moec.artifact.summary import model_size
from moec.errors import UsageError
from moec.experts import (
    FeedForward,
    find_dense_layers,
    find_moe_layers,
    load_dense,
    load_expert,
    permute_experts,
    run_layer,
)
from moec.module import Module
from moec.passes.factorizing.activity import Activity, Observed, activities, markers
from moec.passes.factorizing.co_activation import co_active_groups, distances
from moec.passes.factorizing.co_activation_graph import cut_weight, graph_groups
from moec.passes.factorizing.importance import loss_share, mean_activity, text_clusters
from moec.passes.factorizing.partition import balanced_assignment
from tests.experts.models import calibrate_text, copy_of, difference, output, raised_model

EXACT = 1e-9


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Module:
    module = raised_model("llama", tmp_path_factory.mktemp("llama"))
    text = calibrate_text(tmp_path_factory.mktemp("tokens"), rows=40, length=32, options="gradients=true")
    moec.run_passes(module, text)
    return module


def changed(source: Module, pipeline: str, seed: int = 0) -> Module:
    module = copy_of(source)
    moec.run_passes(module, pipeline, seed=seed)
    return module


def first_block(module: Module) -> tuple[FeedForward, Observed]:
    layer = find_dense_layers(module.op)[0]
    assert module.calibration is not None
    sample = module.calibration.sample(layer)
    return load_dense(layer, module.weights), Observed.of(module.calibration, sample)


def planted_markers(sizes: tuple[int, ...], tokens: int = 600, noise: float = 0.02) -> torch.Tensor:
    """Neurons of one group are active on the same tokens, but for noise."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(sum(sizes)) % len(sizes)
    on = torch.randint(len(sizes), (tokens,), generator=generator)
    return (on[:, None] == group) ^ (torch.rand(tokens, sum(sizes), generator=generator) < noise)


@pytest.mark.parametrize(
    "options",
    [
        "experts=4 partition=co-activation",
        "experts=4 partition=co-activation active=10 activity=normalized iterations=1 shared=24 "
        "shared_by=activation-rate",
        "experts=3 partition=co-activation-graph",
        "experts=4 partition=gradient shared=32 shared_by=gradient",
        "experts=5 partition=gradient uneven=ragged",
    ],
)
def test_all_experts_together_are_the_dense_block(llama: Module, options: str) -> None:
    module = changed(llama, f"factorize{{{options}}}")
    assert difference(output(llama), output(module)) < EXACT
    block, _ = first_block(llama)
    layer = find_moe_layers(module.op)[0]
    experts = [load_expert(layer, module.weights, number) for number in range(layer.expert_count)]
    rows = [tuple(row) for expert in experts if isinstance(expert, FeedForward) for row in expert.up.dense().tolist()]
    whole = [tuple(row) for row in block.up.dense().tolist()]
    assert len(set(rows)) == len(rows) == len(whole) - sum(int(o[7:]) for o in options.split() if o[:7] == "shared=")
    assert set(rows) <= set(whole)
    assert changed(llama, f"factorize{{{options}}}").print() == module.print()


def test_markers_are_the_largest_activities(llama: Module) -> None:
    block, observed = first_block(llama)
    found = markers(block, observed, 9, Activity.CONTRIBUTION)
    x = observed.x[:50]
    gate, up = x @ block.gate.dense().T, x @ block.up.dense().T  # type: ignore[union-attr]
    strength = (torch.nn.functional.silu(gate) * up).abs() * block.down.dense().norm(dim=0)
    assert torch.equal(found[:50], strength >= strength.sort(descending=True).values[:, 8:9])
    assert found.sum(1).tolist() == [9] * len(observed)
    # of tokens and rows of length 1, whatever their lengths are
    one = next(activities(block, observed, Activity.NORMALIZED))
    scaled = Observed(3 * observed.x, None, observed.sequence, observed.domain)
    assert torch.allclose(one, next(activities(block, scaled, Activity.NORMALIZED)), atol=1e-6)


def test_shared_neurons_are_those_that_are_active_most_often(llama: Module) -> None:
    block, observed = first_block(llama)
    rate = markers(block, observed, block.width // 10, Activity.CONTRIBUTION).sum(0)
    module = changed(llama, "factorize{experts=4 partition=random shared=16 shared_by=activation-rate}")
    shared = load_dense(find_dense_layers(module.op)[0], module.weights)
    best = torch.sort(rate, descending=True, stable=True).indices[:16].sort().values
    assert torch.equal(shared.up.dense(), block.up.dense()[best])


def test_the_assignment_of_neurons_is_the_one_of_least_distance(llama: Module) -> None:
    block, observed = first_block(llama)
    found = markers(block, observed, 10, Activity.NORMALIZED)
    rate = found.sum(0)
    centroids = found[:, torch.sort(rate, descending=True, stable=True).indices[:4]].float()
    cost = distances(found, centroids)
    assert torch.allclose(cost[5], (found[:, 5:6].float() - centroids).abs().sum(0).double())
    size = block.width // 4
    rows, columns = linear_sum_assignment(cost.repeat_interleave(size, dim=1).numpy())
    best = float(sum(cost[row, column // size] for row, column in zip(rows, columns, strict=True)))
    groups = co_active_groups(found, [size] * 4, iterations=1)
    assert abs(sum(float(cost[group, number].sum()) for number, group in enumerate(groups)) - best) < 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_balanced_assignment_has_the_least_cost(seed: int) -> None:
    cost = torch.rand(35, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows, columns = linear_sum_assignment(cost.repeat_interleave(7, dim=1).numpy())
    best = float(sum(cost[row, column // 7] for row, column in zip(rows, columns, strict=True)))
    labels = balanced_assignment(cost, [7] * 5)
    assert torch.bincount(labels).tolist() == [7] * 5
    assert abs(float(cost.gather(1, labels[:, None]).sum()) - best) < 1e-9


def test_groups_that_are_active_together_are_found() -> None:
    sizes = (12, 12, 12)
    marked = planted_markers(sizes)
    for groups in (co_active_groups(marked, sizes, 20), graph_groups(marked, sizes)):
        assert sorted(sorted(set((group % 3).tolist())) for group in groups) == [[0], [1], [2]]
    ragged = graph_groups(planted_markers((11, 11, 11)), [12, 11, 10])
    assert [len(group) for group in ragged] == [12, 11, 10]
    assert torch.equal(torch.cat(ragged).sort().values, torch.arange(33))


def test_the_cut_is_counted_like_networkx_does() -> None:
    together = torch.randint(0, 9, (12, 12), generator=torch.Generator().manual_seed(2)).float().triu(1)
    together = together + together.T
    graph = networkx.Graph([(a, b, {"weight": float(together[a, b])}) for a, b in combinations(range(12), 2)])
    halves = [torch.arange(5), torch.arange(5, 12)]
    assert cut_weight(together, halves) == networkx.cut_size(graph, range(5), weight="weight")


def test_what_a_neuron_is_worth_to_the_loss(llama: Module) -> None:
    block, observed = first_block(llama)
    kind = text_clusters(observed, 4, torch.Generator().manual_seed(0), "a block")
    # equally many sequences of each kind, and rows of one sequence are of one kind
    assert torch.bincount(kind).tolist() == [10 * 32] * 4
    assert len(torch.unique(torch.stack([kind, observed.sequence]), dim=1).T) == 40
    found = loss_share(block, observed, kind, 4, "a block")
    rows = kind == 2
    hidden = block.hidden_activations(observed.x[rows])
    assert observed.gradient is not None
    by_hidden = observed.gradient[rows] @ block.down.dense()
    assert torch.allclose(found[2], (hidden * by_hidden).abs().mean(0).double(), rtol=1e-4)


@pytest.mark.parametrize("options", ["", "shared=32", "shared=16 shared_by=activation-rate"])
def test_a_calibration_in_front_serves_router_and_scale(llama: Module, options: str) -> None:
    module = changed(llama, f"factorize{{experts=4 partition=co-activation {options}}}")
    layer = find_moe_layers(module.op)[0]
    assert module.calibration is not None
    sample = module.calibration.sample(layer)
    y = run_layer(layer, module.weights, sample.x, sample.router_input).y
    assert y is not None
    assert difference(sample.y, y) < 1e-5
    moec.run_passes(module, "init-router,set-routing{scale=calibrated}")
    assert all(abs(layer.route.routing.scale - 1) < 1e-6 for layer in find_moe_layers(module.op))
    # whoever calibrated before does not see it change
    assert llama.calibration is not None
    block, observed = first_block(llama)
    assert difference(llama.calibration.sample(find_dense_layers(llama.op)[0]).y, block.apply(observed.x)) < 1e-5


@pytest.mark.parametrize("partition", ["domain-masks", "gradient-overlap"])
def test_overlapping_experts_are_masks_of_the_block(llama: Module, partition: str) -> None:
    module = changed(llama, f"factorize{{experts=3 partition={partition} keep=0.25}}")
    layer = find_moe_layers(module.op)[0]
    assert layer.top_k == 1
    block, observed = first_block(llama)
    up = [tuple(row) for row in block.up.dense().tolist()]
    shared = next((found for found in find_dense_layers(module.op) if found.is_beside_experts), None)
    everywhere = [] if shared is None else load_dense(shared, module.weights).up.dense().tolist()
    masks = []
    for number in range(3):
        expert = load_expert(layer, module.weights, number)
        assert isinstance(expert, FeedForward)
        own = {up.index(tuple(row)) for row in [*expert.up.dense().tolist(), *everywhere]}
        masks.append(own)
        hidden = block.hidden_activations(observed.x)
        only = torch.zeros(block.width, dtype=torch.bool)
        only[sorted(own)] = True
        given = expert.apply(observed.x)
        if shared is not None:
            given = given + load_dense(shared, module.weights).apply(observed.x)
        assert difference((hidden * only) @ block.down.dense().T, given) < 1e-5
    # an expert has exactly its share of the neurons (Read-ME's own code loses one), and what all have is dense
    assert [len(own) for own in masks] == [block.width // 4] * 3
    assert len(everywhere) == len(set.intersection(*masks))
    assert difference(output(llama), output(module)) > 1e-3


def test_a_shared_block_is_not_cut_again(llama: Module) -> None:
    module = changed(llama, "factorize{experts=4 shared=16}")
    before = module.print()
    report = moec.run_passes(module, "factorize{experts=2}")
    assert module.print() == before
    assert {refusal.reason for refusal in report.records[0].refusals} == {"it stands beside experts"}


def test_texts_are_the_kinds_where_there_is_one_for_each_expert(llama: Module) -> None:
    block, observed = first_block(llama)
    domain = 3 * (observed.sequence % 2)
    two = Observed(observed.x, observed.gradient, observed.sequence, domain)
    kind = text_clusters(two, 2, torch.Generator(), "a block")
    assert torch.equal(kind, observed.sequence % 2)
    use = mean_activity(block, two, kind, 2)
    assert torch.allclose(use[1], block.hidden_activations(observed.x[kind == 1]).abs().double().mean(0), rtol=1e-5)


def test_bad_input_is_refused(llama: Module, tmp_path: Path) -> None:
    plain = copy_of(llama)
    plain.calibration = None
    with pytest.raises(UsageError, match="was not calibrated"):
        changed(plain, "factorize{experts=4 partition=co-activation}")
    few = calibrate_text(tmp_path, rows=3, length=8)
    report = moec.run_passes(plain, f"{few},factorize{{experts=4 partition=co-activation}}")
    assert "24 tokens to tell 96 neurons apart, of which 9 count as active on each; give 171 or more" in str(
        report.records[-1].remarks[0]
    )
    with pytest.raises(UsageError, match="this needs gradients"):
        changed(llama, f"{few},factorize{{experts=2 partition=gradient}}")
    with pytest.raises(UsageError, match="96 kinds of text cannot be told apart in 40 sequences"):
        changed(llama, "factorize{experts=96 partition=gradient}")


def test_one_expert_is_the_block_with_its_neurons_alone(llama: Module) -> None:
    module = changed(llama, "factorize{experts=4 partition=co-activation}")
    block, observed = first_block(llama)
    layer = find_moe_layers(module.op)[0]
    up = [tuple(row) for row in block.up.dense().tolist()]
    hidden = block.hidden_activations(observed.x)
    for number in range(4):
        expert = load_expert(layer, module.weights, number)
        assert isinstance(expert, FeedForward)
        mask = torch.zeros(block.width)
        mask[[up.index(tuple(row)) for row in expert.up.dense().tolist()]] = 1
        assert int(mask.sum()) == block.width // 4
        assert difference((hidden * mask) @ block.down.dense().T, expert.apply(observed.x)) < 1e-5


def test_experts_in_groups_are_the_block_under_a_mask_for_any_number_of_them(llama: Module) -> None:
    """What is computed one expert at a time is the dense block whose other neurons are zero, token by token."""
    block, observed = first_block(llama)
    up = [tuple(row) for row in block.up.dense().tolist()]
    hidden = block.hidden_activations(observed.x)
    for k in (1, 2, 3, 4):
        module = changed(llama, f"factorize{{experts=4 shared=32}},init-router,set-routing{{k={k}}}")
        layer = find_moe_layers(module.op)[0]
        run = run_layer(layer, module.weights, observed.x, observed.x)
        mask = torch.zeros(len(observed.x), block.width)
        for number in range(4):
            expert = load_expert(layer, module.weights, number)
            assert isinstance(expert, FeedForward)
            neurons = [up.index(tuple(row)) for row in expert.up.dense().tolist()]
            mask[:, neurons] = (run.ids == number).any(1, keepdim=True).float()
        assert run.y is not None and mask.sum(1).unique().tolist() == [k * (block.width - 32) // 4]
        assert difference((hidden * mask) @ block.down.dense().T, run.y) < 1e-5


def test_flops_are_those_of_the_chosen_experts_and_of_the_router(llama: Module) -> None:
    layers, hidden, width = len(find_dense_layers(llama.op)), 64, 96
    dense = model_size(llama).active_flops
    for k, shared in ((4, 0), (3, 0), (1, 0), (2, 32)):
        module = changed(llama, f"factorize{{experts=4 shared={shared}}},init-router,set-routing{{k={k}}}")
        unused = (width - shared) * (4 - k) // 4
        assert model_size(module).active_flops == dense - 2 * layers * hidden * (3 * unused - 4)


def test_parameters_are_those_of_the_model_and_of_routers_and_padding(llama: Module) -> None:
    layers, hidden, width = len(find_dense_layers(llama.op)), 64, 96
    for experts, options in ((4, ""), (4, "shared=32"), (7, "uneven=pad"), (7, "uneven=ragged")):
        # routers of zeros are one weight for all layers
        module = changed(llama, f"factorize{{experts={experts} {options}}},init-router{{kind=random}}")
        padding = -width % experts if "pad" in options else 0
        more = model_size(module).parameters - model_size(llama).parameters
        assert more == layers * (experts * hidden + padding * 3 * hidden)
        if padding:
            last = load_expert(find_moe_layers(module.op)[0], module.weights, experts - 1)
            assert (
                isinstance(last, FeedForward) and not last.down.dense()[:, -1].any() and not last.up.dense()[-1].any()
            )


def test_the_order_of_experts_is_of_no_matter(llama: Module) -> None:
    module = changed(llama, "factorize{experts=4},init-router,set-routing{k=2}")
    before = output(module)
    for layer in find_moe_layers(module.op):
        permute_experts(layer, [2, 0, 3, 1])
    assert difference(before, output(module)) < EXACT
