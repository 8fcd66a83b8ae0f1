"""refit-down on tiny models: what it takes back, what it must leave, and when it must not be used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moec
from moec.calibration.sample import LayerSample
from moec.experts import (
    Dense,
    FeedForward,
    LowRank,
    MoeLayer,
    Projection,
    alias_experts,
    find_moe_layers,
    load_expert,
    protect_experts,
    replace_experts,
    run_layer,
    slice_experts,
)
from moec.ir import structural_difference
from moec.module import Module
from moec.passes.merging.layer_fit import FitScope, FitSettings, fit_layer
from moec.pipeline.manager import PassRecord
from tests.experts.models import copy_of, difference, output, raised_model
from tests.numerics.calibrated_models import random_sequences, write_tokens


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Module:
    """Experts of width 12: 64 sequences of 32 tokens are enough to fit them."""
    folder = tmp_path_factory.mktemp("mixtral")
    module = raised_model("mixtral", folder, intermediate_size=12)
    tokens = write_tokens(folder / "tokens.json", random_sequences([32] * 64))
    moec.run_passes(module, f"calibrate{{tokens={tokens}}}")
    return module


def layers_of(module: Module) -> tuple[MoeLayer, ...]:
    return find_moe_layers(module.op)


def feed_forward(module: Module, layer: MoeLayer, expert: int) -> FeedForward:
    found = load_expert(layer, module.weights, expert)
    assert isinstance(found, FeedForward)
    return found


def changed(source: Module, edit: Callable[[MoeLayer], MoeLayer]) -> Module:
    """A copy whose layers are edited, and that remembers the calibration of the original."""
    module = copy_of(source)
    module.calibration = source.calibration
    for layer in layers_of(module):
        edit(layer)
    return module


def refitted(source: Module, options: str = "") -> tuple[Module, PassRecord]:
    module = copy_of(source)
    module.calibration = source.calibration
    report = moec.run_passes(module, f"refit-down{{{options}}}")
    return module, report.records[0]


def errors(source: Module, module: Module) -> list[float]:
    """Squared error of each layer on all rows of the sample, as a share of the original output."""
    assert source.calibration is not None
    result = []
    for before, after in zip(layers_of(source), layers_of(module), strict=True):
        sample = source.calibration.sample(before)
        y = run_layer(after, module.weights, sample.x, sample.router_input).y
        assert y is not None
        result.append(float((y - sample.y).square().sum() / sample.y.square().sum()))
    return result


def drop_three(layer: MoeLayer) -> MoeLayer:
    return slice_experts(layer, [0, 1, 2, 4, 6])


def share_three(layer: MoeLayer) -> MoeLayer:
    return alias_experts(layer, [0, 1, 2, 0, 4, 1, 6, 6])


def narrow(module: Module) -> Callable[[MoeLayer], MoeLayer]:
    def edit(layer: MoeLayer) -> MoeLayer:
        new = {}
        for number in range(0, 8, 2):
            expert = feed_forward(module, layer, number)
            assert expert.gate is not None
            gate, up = (Projection(Dense(item.dense()[:7])) for item in (expert.gate, expert.up))
            new[number] = FeedForward(expert.activation, gate, up, Projection(Dense(expert.down.dense()[:, :7])))
        return replace_experts(layer, module.weights, new)

    return edit


def factored(module: Module, *, shared: bool = False) -> Callable[[MoeLayer], MoeLayer]:
    """All down projections of rank 5, with factors of their own or a left factor for all."""

    def edit(layer: MoeLayer) -> MoeLayer:
        experts = {number: feed_forward(module, layer, number) for number in range(8)}
        left = torch.linalg.svd(torch.cat([expert.down.dense() for expert in experts.values()], dim=1))[0][:, :5]
        new = {}
        for number, expert in experts.items():
            down = expert.down.dense()
            if not shared:
                left = torch.linalg.svd(down)[0][:, :5]
            matrix = LowRank(left.contiguous(), (left.T @ down).contiguous(), None, left_is_shared=shared)
            new[number] = replace(expert, down=Projection(matrix), loaded=())
        return replace_experts(layer, module.weights, new)

    return edit


def test_nothing_changes_where_nothing_was_lost(mixtral: Module) -> None:
    result, record = refitted(mixtral)
    assert structural_difference(mixtral.op, result.op) is None
    assert record.statistics == {"fitted": 0, "layers": 0, "rejected": 0, "exact": 2}


def test_a_change_of_rounding_alone_is_no_error(mixtral: Module) -> None:
    def rounded(layer: MoeLayer) -> MoeLayer:
        expert = feed_forward(mixtral, layer, 0)
        nudged = expert.down.dense() * (1 + 1e-6)
        return replace_experts(layer, mixtral.weights, {0: replace(expert, down=Projection(Dense(nudged)), loaded=())})

    source = changed(mixtral, rounded)
    result, record = refitted(source)
    assert record.statistics["exact"] == 2
    assert difference(output(source), output(result)) == 0


@pytest.mark.parametrize("scope", ["joint", "expert", "auto"])
@pytest.mark.parametrize("how", ["drop", "share", "narrow", "factor"])
def test_it_takes_back_a_part_of_every_structural_loss(mixtral: Module, how: str, scope: str) -> None:
    edit = {"drop": drop_three, "share": share_three, "narrow": narrow(mixtral), "factor": factored(mixtral)}[how]
    source = changed(mixtral, edit)
    result, record = refitted(source, f"scope={scope}")
    assert record.statistics["layers"] == 2, record.remarks
    for before, after in zip(errors(mixtral, source), errors(mixtral, result), strict=True):
        assert after < 0.95 * before
    for old, new in zip(layers_of(source), layers_of(result), strict=True):
        assert (old.stored, old.outputs, old.expert_count) == (new.stored, new.outputs, new.expert_count)


def test_only_last_products_change(mixtral: Module) -> None:
    source = changed(mixtral, drop_three)
    result, _ = refitted(source)
    for old, new in zip(layers_of(source), layers_of(result), strict=True):
        for expert in range(5):
            before, after = feed_forward(source, old, expert), feed_forward(result, new, expert)
            assert before.gate is not None and after.gate is not None
            assert torch.equal(before.gate.dense(), after.gate.dense())
            assert torch.equal(before.up.dense(), after.up.dense())
            assert not torch.equal(before.down.dense(), after.down.dense())


def test_many_sweeps_come_to_the_joint_solution(mixtral: Module) -> None:
    source = changed(mixtral, drop_three)
    joint, few, many = (
        errors(mixtral, refitted(source, f"{options} ridge=1e-6 balance=false")[0])
        for options in ("scope=joint", "scope=expert sweeps=1", "scope=expert sweeps=40")
    )
    for best, first, last in zip(joint, few, many, strict=True):
        assert last == pytest.approx(best, rel=0.02)
        assert best < last + 1e-6 < first


def test_protected_experts_stay_and_the_others_make_up_for_it(mixtral: Module) -> None:
    source = changed(mixtral, lambda layer: protect_experts(share_three(layer), [1, 3]))
    result, record = refitted(source)
    assert record.statistics["fitted"] == 2 * 3
    for old, new in zip(layers_of(source), layers_of(result), strict=True):
        for expert in (1, 3):
            assert torch.equal(
                feed_forward(source, old, expert).down.dense(), feed_forward(result, new, expert).down.dense()
            )
    assert all(a < b for a, b in zip(errors(mixtral, result), errors(mixtral, source), strict=True))


def test_factors_that_experts_share_are_not_fitted(mixtral: Module) -> None:
    source = changed(mixtral, factored(mixtral, shared=True))
    result, record = refitted(source)
    assert structural_difference(source.op, result.op) is None
    assert record.statistics["rejected"] == 2
    assert all("no expert of it can be fitted" in remark.text for remark in record.remarks)
    assert record.warnings == record.remarks


def test_codes_are_not_fitted_and_nobody_is_warned(mixtral: Module) -> None:
    """`solve-budget` fits before it packs."""
    source = copy_of(mixtral)
    moec.run_passes(source, "quantize{bits=4 group=row}")
    source.calibration = mixtral.calibration
    result, record = refitted(source)
    assert structural_difference(source.op, result.op) is None
    assert record.statistics["rejected"] == len(record.remarks) == 2 and not record.warnings


def test_too_few_tokens(mixtral: Module) -> None:
    source = changed(mixtral, drop_three)
    result, record = refitted(source, "least-tokens=2049")
    assert structural_difference(source.op, result.op) is None
    assert record.statistics == {"fitted": 0, "layers": 0, "rejected": 2, "exact": 0}
    assert all("2048 tokens are too few, at least 2049 are needed" in item.text for item in record.remarks)


def test_a_fit_to_noise_is_rejected_by_the_tokens_that_it_did_not_see(mixtral: Module, tmp_path: Path) -> None:
    source = changed(mixtral, drop_three)
    few = copy_of(mixtral)
    tokens = write_tokens(tmp_path / "tokens.json", random_sequences([12] * 6))
    moec.run_passes(few, f"calibrate{{tokens={tokens}}}")
    source.calibration = few.calibration
    result, record = refitted(source, "least-tokens=0 ridge=1e-9")
    assert structural_difference(source.op, result.op) is None
    assert record.statistics["rejected"] == 2
    assert all("the error on held-out tokens would go from" in item.text for item in record.remarks)


def test_two_tokens(mixtral: Module, tmp_path: Path) -> None:
    source = changed(mixtral, drop_three)
    single = copy_of(mixtral)
    tokens = write_tokens(tmp_path / "tokens.json", [[5, 7]])
    moec.run_passes(single, f"calibrate{{tokens={tokens}}}")
    source.calibration = single.calibration
    for options in ("", "least-tokens=0"):
        result, record = refitted(source, options)
        assert structural_difference(source.op, result.op) is None
        assert record.statistics["rejected"] == 2
        assert all("2 tokens are too few" in remark.text for remark in record.remarks)


def test_a_token_with_a_huge_output_does_not_decide_the_fit(mixtral: Module) -> None:
    assert mixtral.calibration is not None
    source = changed(mixtral, drop_three)
    layer = layers_of(source)[0]
    sample = mixtral.calibration.sample(layer)
    x, y = sample.x.clone(), sample.y.clone()
    huge = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:40]
    x[huge] *= 30
    y[huge] *= 900
    bent = LayerSample(x, sample.router_input, y, None, sample.sequence, sample.weights)
    usual = torch.ones(len(x), dtype=torch.bool)
    usual[huge] = False
    left = []
    for balance in (False, True):
        settings = FitSettings(FitScope.JOINT, (1e-3,), 0.2, 0, 1, balance)
        fit = fit_layer(layer, bent, source.weights, settings, torch.Generator().manual_seed(0))
        copy = copy_of(source)
        after = replace_experts(layers_of(copy)[0], copy.weights, fit.experts)
        found = run_layer(after, copy.weights, x[usual], sample.router_input[usual]).y
        assert found is not None
        left.append(float((found - y[usual]).square().sum()))
    assert left[1] < 0.9 * left[0]


def test_the_same_fit_twice(mixtral: Module) -> None:
    source = changed(mixtral, share_three)
    first, second = (refitted(source)[0] for _ in range(2))
    assert structural_difference(first.op, second.op) is None


def test_biases_stay(tmp_path: Path) -> None:
    module = raised_model("gpt_oss", tmp_path, intermediate_size=12)
    tokens = write_tokens(tmp_path / "tokens.json", random_sequences([32] * 64))
    moec.run_passes(module, f"calibrate{{tokens={tokens}}}")
    source = changed(module, drop_three)
    result, record = refitted(source)
    assert record.statistics["layers"] == 2
    for old, new in zip(layers_of(source), layers_of(result), strict=True):
        before, after = feed_forward(source, old, 2).down, feed_forward(result, new, 2).down
        assert before.bias is not None and after.bias is not None and torch.equal(before.bias, after.bias)
    assert all(a < b for a, b in zip(errors(module, result), errors(module, source), strict=True))
