"""upcycle of one model: copies that add up to the block are exact whatever the router says, and the rest is lossy."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moec
from moec.artifact.options import Check
from moec.artifact.recorder import LedgerRecorder
from moec.dialects.builtin import WeightOp
from moec.dialects.nn import MLPOp
from moec.errors import UsageError
from moec.experts import (
    Dense,
    FeedForward,
    Projection,
    find_dense_layers,
    find_moe_layers,
    load_dense,
    load_expert,
    replace_routing,
)
from moec.ir import TensorType
from moec.module import Module
from moec.passes.upcycle import Upcycle
from moec.passes.upcycling.copies import shards, ternary
from moec.pipeline.base import Claim
from moec.pipeline.manager import PassManager, Pipeline
from tests.experts.models import copy_of, difference, output, raised_model

EXACT = 1e-9


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return raised_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def logits(llama: Module) -> torch.Tensor:
    return output(llama)


def changed(source: Module, options: str = "", seed: int = 0) -> Module:
    module = copy_of(source)
    moec.run_passes(module, f"upcycle{{{options}}}", seed=seed)
    return module


def experts_of(module: Module, number: int = 0) -> list[FeedForward]:
    layer = find_moe_layers(module.op)[number]
    experts = [load_expert(layer, module.weights, expert) for expert in range(layer.expert_count)]
    return [expert for expert in experts if isinstance(expert, FeedForward)]


@pytest.mark.parametrize(
    "options",
    [
        "experts=4",
        "experts=1",
        "experts=4 k=1",
        "experts=3 k=3 gates=score",
        "experts=3 granularity=4",
        "experts=3 granularity=4 k=8",
        "experts=1 granularity=2",
        "experts=4 perturb=drop ratio=0",
        "experts=4 kind=ternary shared=seed scale=0",
        "experts=4 every=2",
    ],
)
def test_what_claims_to_be_exact_is(llama: Module, logits: torch.Tensor, options: str) -> None:
    assert difference(logits, output(changed(llama, options))) < EXACT
    assert one_pass(options).promise() is Claim.EXACT


@pytest.mark.parametrize("options", ["experts=4", "experts=3 granularity=4"])
def test_the_router_has_no_influence_on_copies(llama: Module, logits: torch.Tensor, options: str) -> None:
    for seed in (1, 2, 3):
        assert difference(logits, output(changed(llama, options, seed))) < EXACT


def test_biases_are_added_once(tmp_path: Path) -> None:
    dense = raised_model("gpt2", tmp_path)
    before = output(dense)
    assert difference(before, output(changed(dense, "experts=3 granularity=4 k=8"))) < EXACT
    block = load_dense(find_dense_layers(dense.op)[0], dense.weights, torch.float64)
    rows = torch.randn(5, block.down.matrix.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = torch.stack([part.apply(rows) for part in shards(block, 4)]).sum(0)
    assert difference(block.apply(rows), total) < 1e-12


@pytest.mark.parametrize(
    "options",
    [
        "experts=4 gates=score",
        "experts=4 granularity=2 gates=score",
        "experts=4 scale=2",
        "experts=4 shared=seed",
        "experts=4 kind=ternary",
        "experts=4 perturb=noise",
        "experts=4 perturb=drop",
    ],
)
def test_what_changes_the_function_does_not_claim_to_be_exact(
    llama: Module, logits: torch.Tensor, options: str
) -> None:
    assert difference(logits, output(changed(llama, options))) > 1e-4
    assert one_pass(options).promise() is Claim.LOSSY


def one_pass(options: str) -> Upcycle:
    found = Pipeline.parse(f"upcycle{{{options}}}").passes[0].instance
    assert isinstance(found, Upcycle)
    return found


def test_the_ledger_holds_plain_copies_to_their_claim(llama: Module) -> None:
    module = copy_of(llama)
    recorder = LedgerRecorder(module, Check.CHANGED)
    pipeline = Pipeline.parse("upcycle{experts=2 granularity=4}")
    PassManager(pipeline, observers=[recorder]).run(module.op, weights=module.weights, module=module)
    assert [(entry.claim, entry.outcome.value) for entry in recorder.entries] == [("exact", "within bound")]


def test_an_encoder_with_one_expert_for_each_token(tmp_path: Path) -> None:
    """Gates of one choice are one; the probability of the choice in its place (Switch) is no copy's gate."""
    encoder = raised_model("bert", tmp_path)
    before = output(encoder)
    assert difference(before, output(changed(encoder, "experts=4 k=1"))) < EXACT
    assert difference(before, output(changed(encoder, "experts=4 k=1 gates=score"))) > 1e-3


def test_parameters_are_those_of_all_copies_and_the_router(llama: Module) -> None:
    block = load_dense(find_dense_layers(llama.op)[0], llama.weights)
    size = 3 * block.up.dense().numel()
    for options, copies in (("experts=5", 5), ("experts=3 granularity=4", 3), ("experts=2 perturb=drop", 2)):
        layer = find_moe_layers(changed(llama, options).op)[0]
        shapes = [value.type.static_shape for value in layer.experts.weights if isinstance(value.type, TensorType)]
        assert sum(math.prod(shape) for shape in shapes) == copies * size
        assert layer.outputs == layer.expert_count == copies * (4 if "granularity" in options else 1)


@pytest.mark.parametrize("choices", [2, 6])
def test_parts_of_copies_are_not_exact(llama: Module, logits: torch.Tensor, choices: int) -> None:
    module = changed(llama, "experts=3 granularity=4")
    for layer in find_moe_layers(module.op):
        replace_routing(layer, replace(layer.route.routing, k=choices))
    assert difference(logits, output(module)) > 1e-3


def test_plain_copies_are_the_bytes_of_the_source(llama: Module) -> None:
    for options in ("experts=4", "experts=2 granularity=4", "experts=2 shared=seed"):
        module = changed(llama, options)
        added = [op for op in module.op.walk() if isinstance(op, WeightOp) and "stored(" in op.source]
        assert {op.weight_name.rpartition(".router")[1] for op in added} == {".router"}, options
        blocks = [load_dense(layer, llama.weights) for layer in find_dense_layers(llama.op)]
        found = experts_of(module)
        width = found[0].width
        for number, expert in enumerate(found):
            start = number % (blocks[0].width // width) * width
            assert torch.equal(expert.up.dense(), blocks[0].up.dense()[start : start + width])
            assert torch.equal(expert.down.dense(), blocks[0].down.dense()[:, start : start + width])


def test_dropped_neurons_are_aligned_and_the_rest_stays(llama: Module) -> None:
    block = load_dense(find_dense_layers(llama.op)[0], llama.weights)
    module = changed(llama, "experts=3 perturb=drop ratio=0.25")
    sets = []
    for expert in experts_of(module):
        assert expert.gate is not None and block.gate is not None
        changes = [
            (expert.gate.dense() != block.gate.dense()).any(1),
            (expert.up.dense() != block.up.dense()).any(1),
            (expert.down.dense() != block.down.dense()).any(0),
        ]
        assert all(torch.equal(change, changes[0]) for change in changes)
        assert int(changes[0].sum()) == block.width // 4
        old, new = block.gate.dense()[changes[0]], expert.gate.dense()[changes[0]]
        count = old.numel()
        assert abs(float(new.mean() - old.mean())) < 4 * float(old.std()) / count**0.5
        assert abs(float(new.std() / old.std()) - 1) < 4 / (2 * count) ** 0.5
        sets.append(tuple(changes[0].nonzero()[:, 0].tolist()))
    assert len(set(sets)) == 3


def test_neurons_drawn_for_each_matrix_break_more_and_are_warned_of(llama: Module) -> None:
    module = copy_of(llama)
    report = moec.run_passes(module, "upcycle{experts=3 perturb=drop ratio=0.5 aligned=false}")
    assert "more than `ratio` of them are broken" in str(report.records[0].remarks[0])
    block = load_dense(find_dense_layers(llama.op)[0], llama.weights)
    expert = experts_of(module)[0]
    broken = (expert.up.dense() != block.up.dense()).any(1) | (expert.down.dense() != block.down.dense()).any(0)
    assert int(broken.sum()) > 0.6 * block.width


def test_noise_hits_the_share_asked_for(llama: Module) -> None:
    block = load_dense(find_dense_layers(llama.op)[0], llama.weights)
    expert = experts_of(changed(llama, "experts=2 perturb=noise ratio=0.1 noise=0.5"))[0]
    moved = expert.up.dense() - block.up.dense()
    hit = moved != 0
    assert abs(float(hit.double().mean()) - 0.1) < 4 * (0.09 / hit.numel()) ** 0.5
    assert abs(float(moved[hit].std()) / 0.5 - 1) < 4 / (2 * int(hit.sum())) ** 0.5


def test_ternary_experts_have_three_values_and_the_shared_block_is_the_source(llama: Module) -> None:
    module = changed(llama, "experts=4 kind=ternary shared=seed k=1")
    block = load_dense(find_dense_layers(llama.op)[0], llama.weights)
    expert = experts_of(module)[0]
    scale = block.up.dense().abs().mean()
    assert set(expert.up.dense().unique().tolist()) <= {float(-scale), 0.0, float(scale)}
    assert torch.equal(expert.up.dense(), ternary(block).up.dense())
    beside = next(op for op in module.op.walk() if isinstance(op, MLPOp))
    kept = load_dense(find_dense_layers(module.op)[0], module.weights)
    assert beside is find_dense_layers(module.op)[0].op and torch.equal(kept.down.dense(), block.down.dense())


def test_a_factor_on_gate_rows_is_no_output_scale(llama: Module) -> None:
    """The factor c of an output as c^(1/3) on three matrices, as released code has it, is wrong under SiLU."""
    block = load_dense(find_dense_layers(llama.op)[0], llama.weights, torch.float64)
    rows = torch.randn(9, block.down.matrix.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert block.gate is not None

    def scaled(projection: Projection, factor: float) -> Projection:
        return Projection(Dense(projection.dense() * factor), projection.bias)

    spread = replace(
        block,
        gate=scaled(block.gate, 2 ** (1 / 3)),
        up=scaled(block.up, 2 ** (1 / 3)),
        down=scaled(block.down, 2 ** (1 / 3)),
    )
    on_down = replace(block, down=scaled(block.down, 2.0))
    assert difference(2 * block.apply(rows), on_down.apply(rows)) < 1e-12
    assert difference(2 * block.apply(rows), spread.apply(rows)) > 1e-3


def test_only_the_chosen_blocks_become_experts(llama: Module) -> None:
    count = len(find_dense_layers(llama.op))
    assert len(find_moe_layers(changed(llama, "experts=2 every=2").op)) == count // 2
    module = changed(llama, "experts=2 layers=0")
    assert [layer.name for layer in find_moe_layers(module.op)] == [find_dense_layers(llama.op)[0].name]
    assert len(find_dense_layers(module.op)) == count - 1


def test_a_second_run_finds_nothing_and_other_mistakes_are_named(llama: Module) -> None:
    with pytest.raises(UsageError, match="no dense feed-forward block"):
        moec.run_passes(changed(llama, "experts=2 shared=seed"), "upcycle")
    with pytest.raises(UsageError, match="5 shards do not divide 96 neurons"):
        changed(llama, "experts=2 granularity=5")
    with pytest.raises(UsageError, match="no block 9 among"):
        changed(llama, "experts=2 layers=9")


def test_a_seed_decides_the_router_and_nothing_else(llama: Module) -> None:
    one, again, other = (changed(llama, "experts=2", seed) for seed in (3, 3, 4))
    assert one.print() == again.print() != other.print()
    layer = find_moe_layers(one.op)[0]
    weight = layer.router.tensor("weight").defining_op
    assert isinstance(weight, WeightOp)
    grouped = find_moe_layers(changed(llama, "experts=2 granularity=4", 3).op)[0].router.tensor("weight").defining_op
    assert isinstance(grouped, WeightOp)
    rows = one.weights.load(grouped.source)
    assert torch.equal(rows, one.weights.load(weight.source).repeat_interleave(4, dim=0))
    assert len(rows.unique(dim=0)) == 2
