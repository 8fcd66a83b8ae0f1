"""merge-experts on tiny models: what must not change the function, who goes where, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moec
from moec.errors import UnsafeInputError, UsageError
from moec.experts import (
    Constant,
    Dense,
    Expert,
    FeedForward,
    MoeLayer,
    Projection,
    find_moe_layers,
    load_expert,
    protect_experts,
    replace_experts,
    replace_router,
    run_layer,
)
from moec.ir import structural_difference
from moec.module import Module
from moec.passes.merging import join_router_outputs
from moec.pipeline import PipelineReport
from tests.experts.models import copy_of, difference, output, raised_model
from tests.numerics.calibrated_models import random_sequences, write_tokens
from tests.numerics.expert_tensors import permuted

GROUPINGS = ["router-cosine", "mean-output", "weight", "spectral", "co-activation", "facility", "random"]


@pytest.fixture(scope="module")
def identical(mixtral: Module) -> Module:
    return edited(mixtral, lambda layer: dict.fromkeys(range(8), feed_forward(mixtral, layer, 0)))


@pytest.fixture(scope="module")
def with_permuted_copies(mixtral: Module) -> Module:
    """The expert 2 i + 1 is the expert 2 i with its neurons in another order."""
    order = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    return edited(
        mixtral, lambda layer: {i + 1: permuted(feed_forward(mixtral, layer, i), order) for i in range(0, 8, 2)}
    )


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Module:
    module = raised_model("mixtral", tmp_path_factory.mktemp("mixtral"))
    calibrate(module)
    return module


def layers_of(module: Module) -> tuple[MoeLayer, ...]:
    return find_moe_layers(module.op)


def run(module: Module, pipeline: str) -> PipelineReport:
    return moec.run_passes(module, pipeline)


def calibrate(module: Module) -> None:
    assert module.weights.store is not None
    tokens = write_tokens(module.weights.store.folder.parent / "tokens.json", random_sequences([32] * 8))
    run(module, f"calibrate{{tokens={tokens}}}")


def merged(source: Module, options: str) -> Module:
    module = copy_of(source)
    module.calibration = source.calibration
    run(module, f"merge-experts{{{options}}}")
    return module


def edited(source: Module, new: Callable[[MoeLayer], Mapping[int, Expert]], *, measured: bool = True) -> Module:
    """The model with some experts of every layer replaced, calibrated as it is then."""
    module = copy_of(source)
    for layer in layers_of(module):
        replace_experts(layer, module.weights, new(layer))
    if measured:
        calibrate(module)
    return module


def feed_forward(module: Module, layer: MoeLayer, expert: int) -> FeedForward:
    found = load_expert(layer, module.weights, expert)
    assert isinstance(found, FeedForward)
    return found


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("keep", ["1", "0.5"])
def test_identical_experts_merge_without_loss(identical: Module, grouping: str, keep: str) -> None:
    """V6."""
    result = merged(identical, f"keep={keep} grouping={grouping}")
    for layer in layers_of(result):
        assert layer.expert_count == (4 if keep == "0.5" else int(keep))
        assert layer.outputs == 8
    assert difference(output(identical), output(result)) < 1e-12


@pytest.mark.parametrize("align", ["none", "weight", "activation"])
def test_permuted_copies_merge_without_loss_iff_they_are_aligned(with_permuted_copies: Module, align: str) -> None:
    """V5."""
    source = with_permuted_copies
    result = merged(source, f"keep=4 grouping=facility align={align}")
    for layer in layers_of(result):
        assert [layer.stored[i] == layer.stored[i + 1] for i in range(0, 8, 2)] == [True] * 4
    change = difference(output(source), output(result))
    assert change < 1e-5 if align != "none" else change > 1e-2


def test_grouping_by_weight_finds_permuted_copies(with_permuted_copies: Module) -> None:
    source = with_permuted_copies
    # copies of those that stay must go, so the most frequent of each pair decides nothing here: keep 7 of 8
    result = merged(source, "keep=7 grouping=weight select=layer")
    assert difference(output(source), output(result)) < 1e-5


@pytest.mark.parametrize(("grouping", "keep"), list(zip(GROUPINGS, ["8", "20", "0.99"] * 3, strict=False)))
def test_keeping_all_changes_nothing(mixtral: Module, grouping: str, keep: str) -> None:
    result = merged(mixtral, f"keep={keep} grouping={grouping} select=global")
    assert structural_difference(mixtral.op, result.op) is None


@pytest.mark.parametrize(
    ("grouping", "select", "more"),
    [
        ("router-cosine", "global", ""),
        ("router-cosine", "layer", "router=log-sum-exp"),
        ("mean-output", "layer", "align=activation"),
        ("mean-output", "global", "router=keep-row"),
        ("weight", "layer", "keep-dominant"),
        ("weight", "global", "router=log-sum-exp"),
        ("spectral", "layer", "router=keep-row"),
        ("spectral", "global", "weights=saliency"),
        ("co-activation", "layer", ""),
        ("co-activation", "global", "keep-dominant"),
        ("facility", "layer", "router=keep-row"),
        ("facility", "global", "align=activation"),
        ("random", "layer", "router=keep-row"),
    ],
)
def test_every_way_leaves_the_number_that_was_asked_for(mixtral: Module, grouping: str, select: str, more: str) -> None:
    result = merged(mixtral, f"keep=5 grouping={grouping} select={select} {more}")
    counts = [layer.expert_count for layer in layers_of(result)]
    assert sum(counts) == 10 and (select == "global" or counts == [5, 5])
    for layer in layers_of(result):
        assert layer.outputs == (layer.expert_count if "router" in more else 8)
        assert set(layer.stored) == set(range(layer.expert_count))
    assert output(result).isfinite().all()
    again = copy_of(result)
    again.calibration = mixtral.calibration
    if select == "layer":
        run(again, f"merge-experts{{keep=5 grouping={grouping} {more}}}")
        assert structural_difference(result.op, again.op) is None


def test_the_mean_is_weighted_by_what_the_option_says(mixtral: Module) -> None:
    assert mixtral.calibration is not None
    before = layers_of(mixtral)[0]
    statistics = mixtral.calibration.statistics(before)
    shares = {
        "uniform": torch.ones(8),
        "frequency": statistics.count,
        "gate": statistics.gate_mass,
        "saliency": statistics.gated_norm_sum,
    }
    ups = torch.stack([feed_forward(mixtral, before, expert).up.dense() for expert in range(8)]).double()
    for weights, share in shares.items():
        result = merged(mixtral, f"keep=1 align=none weights={weights}")
        found = feed_forward(result, layers_of(result)[0], 0).up.dense().double()
        expected = torch.einsum("e,emh->mh", share.double() / share.double().sum(), ups)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_keep_dominant_only_redirects(mixtral: Module) -> None:
    result = merged(mixtral, "keep=3 grouping=facility keep-dominant")
    for before, after in zip(layers_of(mixtral), layers_of(result), strict=True):
        bodies = [feed_forward(mixtral, before, expert).down.dense() for expert in range(8)]
        for expert in range(3):
            kept = feed_forward(result, after, expert).down.dense()
            assert sum(torch.equal(kept, body) for body in bodies) == 1


def test_facility_redirects_to_the_nearest_of_those_that_stay(mixtral: Module) -> None:
    assert mixtral.calibration is not None
    result = merged(mixtral, "keep=3 grouping=facility keep-dominant")
    for before, after in zip(layers_of(mixtral), layers_of(result), strict=True):
        distortion = mixtral.calibration.redirect_distortion(before)
        bodies = [feed_forward(mixtral, before, expert).down.dense() for expert in range(8)]
        kept = [
            next(e for e in range(8) if torch.equal(bodies[e], feed_forward(result, after, new).down.dense()))
            for new in range(3)
        ]
        for expert in range(8):
            target = kept[after.stored[expert]]
            assert target == expert or distortion[expert, target] == min(distortion[expert, kept])


def test_joined_rows_of_equal_rows_have_the_softmax_mass_of_the_group(mixtral: Module) -> None:
    assert mixtral.calibration is not None
    module = copy_of(mixtral)
    layer = layers_of(module)[0]
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).repeat_interleave(2, 0)
    sample = mixtral.calibration.sample(layer)
    before = replace_router(layer, module.weights, weight)
    old = run_layer(before, module.weights, sample.x, sample.router_input, with_experts=False).logits
    after = join_router_outputs(before, module.weights, sample, {0: (0, 1), 4: (4, 5), 7: (7,)})
    new = run_layer(after, module.weights, sample.x, sample.router_input, with_experts=False).logits
    expected = old.clone()
    expected[:, 0], expected[:, 4] = (torch.logsumexp(old[:, i : i + 2], dim=1) for i in (0, 4))
    torch.testing.assert_close(new, expected, rtol=1e-4, atol=1e-4)


def test_a_joined_row_is_nearer_to_the_mass_of_the_group_than_its_own_row(mixtral: Module) -> None:
    assert mixtral.calibration is not None
    module = copy_of(mixtral)
    layer = layers_of(module)[0]
    sample = mixtral.calibration.sample(layer)
    old = run_layer(layer, module.weights, sample.x, sample.router_input, with_experts=False).logits
    wanted = torch.logsumexp(old[:, :3] + torch.tensor([1.0, 0.5, 0.25]).log(), dim=1)
    after = join_router_outputs(layer, module.weights, sample, {0: (0, 1, 2)}, {0: (1.0, 0.5, 0.25)})
    new = run_layer(after, module.weights, sample.x, sample.router_input, with_experts=False).logits
    assert torch.equal(new[:, 1:], old[:, 1:])
    centred = (old[:, 0] - wanted) - (old[:, 0] - wanted).mean()
    assert float((new[:, 0] - wanted).square().mean()) < 0.5 * float(centred.square().mean())


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("more", ["", "keep-dominant select=global"])
def test_protected_experts_stay_as_they_are(mixtral: Module, grouping: str, more: str) -> None:
    module = copy_of(mixtral)
    module.calibration = mixtral.calibration
    for layer in layers_of(module):
        protect_experts(layer, [1, 6])
    result = merged(module, f"keep=4 grouping={grouping} {more}")
    for before, after in zip(layers_of(module), layers_of(result), strict=True):
        assert len(after.protected) == 2
        for new, old in zip(sorted(after.protected), (1, 6), strict=True):
            first, second = feed_forward(module, before, old), feed_forward(result, after, new)
            assert torch.equal(first.up.dense(), second.up.dense())
            assert torch.equal(first.down.dense(), second.down.dense())
            if not more:
                assert after.stored.count(new) == 1


def test_protected_experts_that_leave_no_room(mixtral: Module) -> None:
    module = copy_of(mixtral)
    module.calibration = mixtral.calibration
    for layer in layers_of(module):
        protect_experts(layer, range(4))
    with pytest.raises(UsageError, match="3 experts cannot stay: 4 are protected"):
        merged(module, "keep=3 keep-dominant")
    with pytest.raises(UsageError, match="4 experts cannot stay: 4 are protected"):
        merged(module, "keep=4")
    assert [layer.expert_count for layer in layers_of(merged(module, "keep=4 keep-dominant"))] == [4, 4]


@pytest.mark.parametrize("router", ["keep-row", "log-sum-exp"])
def test_fewer_rows_than_a_token_chooses(mixtral: Module, router: str) -> None:
    with pytest.raises(UsageError, match="each token chooses 2 of them") as error:
        merged(mixtral, f"keep=1 router={router}")
    assert "router=alias" in error.value.hint
    assert [layer.expert_count for layer in layers_of(merged(mixtral, "keep=1"))] == [1, 1]


def test_experts_of_different_widths_are_not_averaged(mixtral: Module) -> None:
    def narrow(layer: MoeLayer) -> Mapping[int, Expert]:
        expert = feed_forward(mixtral, layer, 0)
        assert expert.gate is not None
        gate, up = (Projection(Dense(item.dense()[:40])) for item in (expert.gate, expert.up))
        return {0: FeedForward(expert.activation, gate, up, Projection(Dense(expert.down.dense()[:, :40])))}

    module = edited(mixtral, narrow)
    result = copy_of(module)
    result.calibration = module.calibration
    report = run(result, "merge-experts{keep=1}")
    assert structural_difference(module.op, result.op) is None
    assert report.records[0].statistics["left"] == 2
    assert all("widths 40, 96" in refusal.reason for refusal in report.records[0].refusals)
    assert [layer.expert_count for layer in layers_of(merged(module, "keep=1 keep-dominant"))] == [1, 1]


def test_experts_without_neurons_are_refused_unless_one_stands_for_all(mixtral: Module) -> None:
    module = edited(mixtral, lambda layer: {3: Constant(torch.ones(64))})
    for grouping in ("weight", "router-cosine"):
        result = copy_of(module)
        result.calibration = module.calibration
        report = run(result, f"merge-experts{{keep=1 grouping={grouping}}}")
        assert structural_difference(module.op, result.op) is None
        assert all("constant, not a feed-forward expert" in item.reason for item in report.records[0].refusals)
    assert output(merged(module, "keep=2 grouping=facility keep-dominant")).isfinite().all()


def test_weights_that_are_no_numbers(mixtral: Module) -> None:
    def broken(layer: MoeLayer) -> Mapping[int, Expert]:
        expert = feed_forward(mixtral, layer, 4)
        up = expert.up.dense().clone()
        up[0, 0] = torch.nan
        return {4: replace(expert, up=Projection(Dense(up)), loaded=())}

    module = edited(mixtral, broken, measured=False)
    module.calibration = mixtral.calibration
    with pytest.raises(UnsafeInputError, match="no finite numbers") as error:
        merged(module, "keep=1 grouping=router-cosine")
    assert "model.layers.0" in error.value.where


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_experts_of_zeros_and_experts_that_no_token_chose(mixtral: Module, grouping: str) -> None:
    def silent(layer: MoeLayer) -> Mapping[int, Expert]:
        expert = feed_forward(mixtral, layer, 2)
        assert expert.gate is not None
        zeros = [Projection(Dense(torch.zeros_like(p.dense()))) for p in (expert.gate, expert.up, expert.down)]
        return {2: FeedForward(expert.activation, *zeros)}

    module = edited(mixtral, silent, measured=False)
    for layer in layers_of(module):
        weight = module.weights.load(str(layer.router.tensor("weight").defining_op.source))  # type: ignore[union-attr]
        bias = torch.zeros(8)
        bias[[5, 7]] = -1e4
        replace_router(layer, module.weights, weight, bias)
    calibrate(module)
    assert module.calibration is not None
    assert module.calibration.statistics(layers_of(module)[0]).count[[5, 7]].tolist() == [0, 0]
    for keep in (1, 4):
        for align in ("weight", "activation"):
            result = merged(module, f"keep={keep} grouping={grouping} align={align}")
            assert output(result).isfinite().all()
            assert [layer.expert_count for layer in layers_of(result)] == [keep, keep]


def test_the_report_names_the_groups_and_how_far_from_best_they_are(mixtral: Module) -> None:
    module = copy_of(mixtral)
    module.calibration = mixtral.calibration
    report = run(module, "merge-experts{keep=1 grouping=facility}")
    texts = [remark.text for remark in report.records[0].remarks]
    assert any("1 of 8 experts stay; at most 0.00% above the least possible error" in text for text in texts)
    assert any("8.0 experts for each that stays" in text for text in texts)
    assert report.records[0].statistics == {"before": 16, "merged": 14, "averaged": 2, "left": 0}


def test_a_model_without_experts(tmp_path: Path) -> None:
    module = raised_model("llama", tmp_path)
    calibrate(module)
    for options in ("keep=2", "keep=2 grouping=facility select=global"):
        assert structural_difference(module.op, merged(module, options).op) is None


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v3"])
def test_other_architectures(model_type: str, tmp_path: Path) -> None:
    module = raised_model(model_type, tmp_path)
    calibrate(module)
    for options in ("keep=0.5", "keep=0.5 grouping=facility keep-dominant", "keep=0.5 grouping=weight"):
        result = merged(module, options)
        assert all(2 * layer.expert_count == before.expert_count for layer, before in zip(
            layers_of(result), layers_of(module), strict=True
        ))  # fmt: skip
        assert output(result).isfinite().all()
