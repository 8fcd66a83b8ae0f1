"""factorize, init-router and set-routing: exact where all experts run, and nearest to the dense model where not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moec
from moec.dialects.moe import WeightFrom
from moec.dialects.nn import MLPOp
from moec.errors import UsageError
from moec.experts import FeedForward, MoeLayer, find_moe_layers, load_expert, run_layer
from moec.module import Module
from moec.passes.factorizing.partition import balanced_assignment, balanced_k_means, group_sizes
from moec.passes.router_init.solutions import expert_importance, least_squares, row_centroids
from tests.experts.models import calibrate_text, copy_of, difference, output, raised_model

EXACT = 1e-9


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Module:
    return raised_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return raised_model("llama", tmp_path_factory.mktemp("llama"))


def changed(source: Module, pipeline: str, seed: int = 0) -> Module:
    module = copy_of(source)
    moec.run_passes(module, pipeline, seed=seed)
    return module


def widths(layer: MoeLayer, module: Module) -> list[int]:
    experts = [load_expert(layer, module.weights, number) for number in range(layer.expert_count)]
    return [expert.width for expert in experts if isinstance(expert, FeedForward)]


@pytest.mark.parametrize("partition", ["contiguous", "random", "k-means"])
def test_all_experts_together_are_the_dense_block(dense: Module, partition: str) -> None:
    module = changed(dense, f"factorize{{experts=4 partition={partition}}}")
    assert not any(isinstance(op, MLPOp) for op in module.op.walk())
    layers = find_moe_layers(module.op)
    assert [(layer.outputs, layer.expert_count, layer.top_k) for layer in layers] == [(4, 4, 4)] * len(layers)
    assert difference(output(dense), output(module)) < EXACT


@pytest.mark.parametrize("options", ["shared=32", "shared=18 uneven=ragged experts=5", "uneven=pad experts=7"])
def test_shared_neurons_and_uneven_experts_are_exact_too(dense: Module, options: str) -> None:
    experts = "" if "experts" in options else "experts=4"
    module = changed(dense, f"factorize{{{options} {experts}}}")
    found = widths(find_moe_layers(module.op)[0], module)
    assert max(found) - min(found) == (1 if "ragged" in options else 0)
    assert any(isinstance(op, MLPOp) for op in module.op.walk()) == ("shared" in options)
    assert difference(output(dense), output(module)) < EXACT


def test_every_neuron_is_in_one_expert_and_bit_equal(llama: Module) -> None:
    module = changed(llama, "factorize{experts=4 partition=random}", seed=3)
    layer = find_moe_layers(module.op)[0]
    experts = [load_expert(layer, module.weights, number) for number in range(4)]
    rows = torch.cat([expert.up.dense() for expert in experts if isinstance(expert, FeedForward)])
    source = changed(llama, "factorize{experts=1}")
    whole = load_expert(find_moe_layers(source.op)[0], source.weights, 0)
    assert isinstance(whole, FeedForward)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, whole.up.dense().tolist()))
    again = changed(llama, "factorize{experts=4 partition=random}", seed=3)
    assert again.print() == module.print() != changed(llama, "factorize{experts=4 partition=random}", seed=4).print()


def test_groups_are_balanced_and_alike() -> None:
    assert group_sizes(10, 4) == [3, 3, 2, 2]
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(4)[torch.arange(40) % 4]
    groups = balanced_k_means(centres + 0.01 * torch.randn(40, 4, generator=generator), [10] * 4, generator)
    assert sorted(sorted(set((group % 4).tolist())) for group in groups) == [[0], [1], [2], [3]]
    same = balanced_k_means(torch.ones(8, 3), [4, 4], generator)
    assert [len(group) for group in same] == [4, 4]


def test_balanced_assignment_is_near_the_optimum() -> None:
    from scipy.optimize import linear_sum_assignment

    cost = torch.rand(24, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = balanced_assignment(cost, [6] * 4)
    assert torch.bincount(labels).tolist() == [6] * 4
    rows, columns = linear_sum_assignment(cost.repeat_interleave(6, dim=1).numpy())
    best = float(sum(cost[row, column // 6] for row, column in zip(rows, columns, strict=True)))
    assert best * (1 - 1e-12) <= float(cost.gather(1, labels[:, None]).sum()) <= best * 1.05


def test_least_squares_finds_a_linear_target_and_centroids_the_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 8, generator=generator)
    weight, bias = torch.randn(3, 8, generator=generator).double(), torch.randn(3, generator=generator).double()
    found = least_squares(rows, rows.double() @ weight.T + bias, 0.0)
    assert torch.allclose(found[0], weight) and torch.allclose(found[1], bias)
    centres = torch.tensor([[4.0, 0.0], [0.0, 0.5]])
    points = centres[torch.arange(100) % 2] + 0.1 * torch.randn(100, 2, generator=generator)
    table = torch.nn.functional.one_hot(torch.arange(100) % 2, 2).double()
    matrix, offset = row_centroids(points, table)
    assert torch.equal((points.double() @ matrix.T + offset).argmax(1), torch.cdist(points, centres).argmin(1))


@pytest.fixture(scope="module")
def sparse(llama: Module, tmp_path_factory: pytest.TempPathFactory) -> Module:
    text = calibrate_text(tmp_path_factory.mktemp("tokens"), rows=80, length=32)
    return changed(llama, f"factorize{{experts=4}},{text}")


def test_a_least_squares_router_errs_less_than_a_random_one(sparse: Module) -> None:
    assert sparse.calibration is not None

    def error(pipeline: str) -> float:
        layer = find_moe_layers(changed(sparse, pipeline).op)[0]
        sample = sparse.calibration.sample(layer)  # type: ignore[union-attr]
        y = run_layer(layer, sparse.weights, sample.x, sample.router_input).y
        assert y is not None
        return float((y - sample.y).square().mean())

    random = [error(f"init-router{{kind=random deviation={0.02 * n}}},set-routing{{k=2}}") for n in (1, 2, 3)]
    fitted = error("init-router,set-routing{k=2}")
    assert fitted < min(random)
    assert error("init-router,set-routing{k=2 scale=calibrated}") <= fitted
    assert error("init-router,set-routing{k=4}") < 1e-9


def test_the_router_ranks_experts_by_what_they_give(sparse: Module) -> None:
    assert sparse.calibration is not None
    module = changed(sparse, "init-router{target=contribution}")
    layer = find_moe_layers(module.op)[0]
    sample = sparse.calibration.sample(layer)
    experts = [load_expert(layer, module.weights, number) for number in range(4)]
    importance = expert_importance([e for e in experts if isinstance(e, FeedForward)], sample.x)
    logits = run_layer(layer, module.weights, sample.x, sample.router_input, with_experts=False).logits
    assert float((logits.argmax(1) == importance.argmax(1)).double().mean()) > 0.5
    assert float((logits.double().mean(0) - importance.mean(0)).abs().max()) < 1e-3 * float(importance.mean())


def test_the_calibrated_scale_is_one_where_nothing_is_left_out(sparse: Module) -> None:
    module = changed(sparse, "init-router,set-routing{k=4 scale=calibrated}")
    assert all(abs(layer.route.routing.scale - 1) < 1e-6 for layer in find_moe_layers(module.op))
    fewer = changed(sparse, "init-router,set-routing{k=1 scale=calibrated combine=one}")
    assert all(layer.top_k == 1 for layer in find_moe_layers(fewer.op))
    assert find_moe_layers(fewer.op)[0].route.routing.weight_from is WeightFrom.ONE


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("factorize{experts=7}", "7 experts do not divide 96 neurons"),
        ("factorize{experts=97}", "too few for 97 experts"),
        ("factorize{experts=4 shared=95}", "too few for 4 experts"),
        ("factorize{experts=4},set-routing{k=5}", "5 experts cannot be chosen among 4"),
        ("factorize{experts=4},init-router", "calibrate"),
    ],
)
def test_what_cannot_be_is_refused(llama: Module, pipeline: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        changed(llama, pipeline)


def test_too_little_text_for_the_router_is_said(llama: Module, tmp_path: Path) -> None:
    module = copy_of(llama)
    report = moec.run_passes(module, f"factorize{{experts=4}},{calibrate_text(tmp_path)},init-router")
    assert "256 rows for 65 unknowns of each expert; give 2080 tokens or more" in str(report.records[-1].remarks[0])
