"""recombine-neurons on tiny models: where it is pruning, where it loses nothing, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

import moec
from moec.errors import UsageError
from moec.experts import (
    Constant,
    Expert,
    FeedForward,
    MoeLayer,
    alias_experts,
    find_moe_layers,
    load_expert,
    protect_experts,
    replace_experts,
    replace_router,
)
from moec.ir import structural_difference
from moec.module import Module
from moec.pipeline.manager import PassRecord
from tests.experts.models import copy_of, difference, output, raised_model
from tests.numerics.calibrated_models import random_sequences, write_tokens
from tests.numerics.expert_tensors import permuted


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Module:
    module = raised_model("mixtral", tmp_path_factory.mktemp("mixtral"))
    calibrate(module)
    return module


def calibrate(module: Module) -> None:
    assert module.weights.store is not None
    tokens = write_tokens(module.weights.store.folder.parent / "tokens.json", random_sequences([32] * 8))
    moec.run_passes(module, f"calibrate{{tokens={tokens}}}")


def layers_of(module: Module) -> tuple[MoeLayer, ...]:
    return find_moe_layers(module.op)


def feed_forward(module: Module, layer: MoeLayer, expert: int) -> FeedForward:
    found = load_expert(layer, module.weights, expert)
    assert isinstance(found, FeedForward)
    return found


def run(source: Module, pipeline: str) -> tuple[Module, PassRecord]:
    module = copy_of(source)
    module.calibration = source.calibration
    return module, moec.run_passes(module, pipeline).records[-1]


def edited(source: Module, new: Callable[[MoeLayer], Mapping[int, Expert]]) -> Module:
    module = copy_of(source)
    for layer in layers_of(module):
        replace_experts(layer, module.weights, new(layer))
    calibrate(module)
    return module


@pytest.mark.parametrize("keep", [2, 5, 8])
def test_with_no_neuron_like_another_it_is_pruning_by_gate_mass(mixtral: Module, keep: int) -> None:
    recombined, record = run(mixtral, f"recombine-neurons{{keep={keep} tau=1}}")
    pruned, _ = run(mixtral, f"prune-experts{{keep={keep} criterion=gate-mass}}")
    assert structural_difference(recombined.op, pruned.op) is None
    assert record.statistics == {"dropped": 2 * (8 - keep), "moved": 0, "lost": 2 * (8 - keep) * 96, "changed": 0}


@pytest.mark.parametrize("keep", [4, 6])
def test_duplicates_are_dropped_without_loss(mixtral: Module, keep: int) -> None:
    """The least of each pair goes into its twin, and its outputs follow."""
    order = torch.randperm(96, generator=torch.Generator().manual_seed(3))

    def twins(layer: MoeLayer) -> Mapping[int, Expert]:
        return {number + 4: permuted(feed_forward(mixtral, layer, number), order) for number in range(4)}

    source = edited(mixtral, twins)
    for layer in layers_of(source):
        # the second of each pair is chosen less often than any first
        weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
        replace_router(layer, source.weights, weight, torch.tensor([0.0] * 4 + [-4.0] * 4))
    calibrate(source)
    result, record = run(source, f"recombine-neurons{{keep={keep} tau=0.9 router=alias}}")
    assert record.statistics["lost"] == 0 and record.statistics["moved"] == 2 * (8 - keep) * 96
    assert [layer.expert_count for layer in layers_of(result)] == [keep, keep]
    assert [layer.outputs for layer in layers_of(result)] == [8, 8]
    assert difference(output(source), output(result)) < 1e-5


@pytest.mark.parametrize("router", ["alias", "keep-row", "log-sum-exp"])
def test_neurons_move_into_experts_of_the_same_width(mixtral: Module, router: str) -> None:
    result, record = run(mixtral, f"recombine-neurons{{keep=5 tau=0.1 router={router}}}")
    assert record.statistics["moved"] > 0 and record.statistics["changed"] > 0
    assert record.statistics["moved"] + record.statistics["lost"] == 2 * 3 * 96
    for layer in layers_of(result):
        assert layer.expert_count == 5 and layer.outputs == (8 if router == "alias" else 5)
        assert {feed_forward(result, layer, expert).width for expert in range(5)} == {96}
    assert output(result).isfinite().all()
    again, _ = run(result, f"recombine-neurons{{keep=5 tau=0.1 router={router}}}")
    assert structural_difference(result.op, again.op) is None


@pytest.mark.parametrize("start", ["own", "largest", "random"])
@pytest.mark.parametrize("gate", ["", "use-gate"])
def test_a_seed_gives_one_result(mixtral: Module, start: str, gate: str) -> None:
    first, second = (run(mixtral, f"recombine-neurons{{keep=5 tau=0.1 start={start} {gate}}}")[0] for _ in range(2))
    assert structural_difference(first.op, second.op) is None


def test_outputs_whose_neurons_were_all_lost_go(mixtral: Module) -> None:
    result, _ = run(mixtral, "recombine-neurons{keep=5 tau=1 router=alias}")
    assert [layer.outputs for layer in layers_of(result)] == [5, 5]


def test_protected_experts_stay_and_receive_nothing(mixtral: Module) -> None:
    source = copy_of(mixtral)
    source.calibration = mixtral.calibration
    for layer in layers_of(source):
        protect_experts(layer, [0, 7])
    result, _ = run(source, "recombine-neurons{keep=3 tau=0}")
    for before, after in zip(layers_of(source), layers_of(result), strict=True):
        for old, new in zip((0, 7), sorted(after.protected), strict=True):
            one, other = feed_forward(source, before, old), feed_forward(result, after, new)
            assert torch.equal(one.up.dense(), other.up.dense()) and torch.equal(one.down.dense(), other.down.dense())
    with pytest.raises(UsageError, match="protected"):
        run(source, "recombine-neurons{keep=1 router=alias}")


def test_experts_that_several_outputs_share(mixtral: Module) -> None:
    source = copy_of(mixtral)
    for layer in layers_of(source):
        alias_experts(layer, [0, 1, 2, 3, 0, 1, 2, 3])
    calibrate(source)
    for router in ("alias", "keep-row", "log-sum-exp"):
        result, _ = run(source, f"recombine-neurons{{keep=2 tau=0 router={router}}}")
        assert [layer.expert_count for layer in layers_of(result)] == [2, 2]
        assert output(result).isfinite().all()


def test_bad_input(mixtral: Module) -> None:
    with pytest.raises(UsageError, match="each token chooses 2"):
        run(mixtral, "recombine-neurons{keep=1}")
    source = edited(mixtral, lambda layer: {3: Constant(torch.ones(64))})
    result, record = run(source, "recombine-neurons{keep=4}")
    assert structural_difference(source.op, result.op) is None
    assert all("constant, not a feed-forward expert" in refusal.reason for refusal in record.refusals)
    assert len(record.refusals) == 2
