"""expert-ancestry: related experts are told from unrelated ones, whatever order neurons are in."""

from __future__ import annotations

import pytest
import torch

import moec
from moec.experts import Constant, find_moe_layers, load_expert, replace_experts
from moec.experts.expert import Dense, FeedForward, Projection
from moec.module import Module
from moec.passes.expert_ancestry import ancestry
from tests.experts.models import copy_of, raised_model


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return raised_model("mixtral", tmp_path_factory.mktemp("mixtral"))


def noisy_copies(source: Module, noise: float) -> Module:
    """All experts of the first layer become the first one plus noise."""
    module = copy_of(source)
    layer = find_moe_layers(module.op)[0]
    first = load_expert(layer, module.weights, 0)
    assert isinstance(first, FeedForward) and first.gate is not None

    def changed(projection: Projection) -> Projection:
        weight = projection.dense()
        return Projection(Dense(weight + noise * weight.std() * torch.randn_like(weight)))

    replace_experts(
        layer,
        module.weights,
        {
            number: FeedForward(first.activation, changed(first.gate), changed(first.up), changed(first.down))
            for number in range(1, layer.expert_count)
        },
    )
    return module


def test_independent_random_experts_are_unrelated(mixtral: Module) -> None:
    found = ancestry(find_moe_layers(mixtral.op)[0], mixtral.weights)
    assert abs(found.cosine) < 0.05
    assert found.identity_rate < 0.2


def test_noisy_copies_are_related_and_keep_their_order(mixtral: Module) -> None:
    module = noisy_copies(mixtral, 0.3)
    found = ancestry(find_moe_layers(module.op)[0], module.weights)
    assert found.cosine > 0.8
    assert found.identity_rate == 1
    report = moec.run_passes(module, "expert-ancestry")
    assert report.records[0].statistics == {"related": 1, "unrelated": 1}
    assert "related: merging" in str(report.records[0].remarks[0])


def test_the_mean_cosine_is_that_of_all_pairs(mixtral: Module) -> None:
    layer = find_moe_layers(mixtral.op)[0]
    vectors = []
    for number in range(layer.expert_count):
        expert = load_expert(layer, mixtral.weights, number)
        assert isinstance(expert, FeedForward) and expert.gate is not None
        parts = (expert.gate.dense(), expert.up.dense(), expert.down.dense())
        vectors.append(torch.cat([part.reshape(-1) for part in parts]).double())
    unit = torch.stack([vector / vector.norm() for vector in vectors])
    pairs = (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]
    assert ancestry(layer, mixtral.weights).cosine == pytest.approx(float(pairs.mean()), abs=1e-9)


def test_layers_without_two_like_experts_are_refused(mixtral: Module) -> None:
    module = copy_of(mixtral)
    layer = find_moe_layers(module.op)[0]
    replace_experts(
        layer,
        module.weights,
        {number: Constant(torch.zeros(layer.hidden_size)) for number in range(layer.expert_count)},
    )
    record = moec.run_passes(module, "expert-ancestry").records[0]
    assert [refusal.reason for refusal in record.refusals] == ["it is constant, not a feed-forward expert"]
