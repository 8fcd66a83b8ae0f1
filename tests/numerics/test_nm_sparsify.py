"""nm-sparsify on tiny models: which weights are zero, what stays as it was, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moec
from moec.errors import UnsafeInputError, UsageError
from moec.experts import (
    Dense,
    FeedForward,
    LowRank,
    MoeLayer,
    find_moe_layers,
    load_expert,
    protect_experts,
    replace_experts,
)
from moec.module import Module
from moec.passes.nm_sparsify import Criterion
from moec.passes.sparsification.inputs import Matrix
from moec.passes.sparsification.learned import LearnedMasks, learn_masks, masked
from moec.passes.sparsification.masks import BlockPattern
from moec.pipeline.manager import PassManager, Pipeline, PipelineReport
from moec.pipeline.spec import PipelineError
from tests.experts.models import calibrate_text, copy_of, output, raised_model


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Module:
    folder = tmp_path_factory.mktemp("mixtral")
    module = raised_model("mixtral", folder)
    moec.run_passes(module, calibrate_text(folder))
    return module


def sparse(source: Module, options: str) -> Module:
    module = copy_of(source)
    moec.run_passes(module, f"nm-sparsify{{{options}}}")
    return module


def report_of(module: Module, options: str) -> PipelineReport:
    pipeline = Pipeline.parse(f"nm-sparsify{{{options}}}")
    return PassManager(pipeline).run(module.op, weights=module.weights, module=module)


def layers_of(module: Module) -> tuple[MoeLayer, ...]:
    return find_moe_layers(module.op)


def matrices(module: Module, layer: MoeLayer, number: int) -> list[torch.Tensor]:
    expert = load_expert(layer, module.weights, number)
    assert isinstance(expert, FeedForward) and expert.gate is not None
    return [expert.gate.dense(), expert.up.dense(), expert.down.dense()]


def all_matrices(module: Module) -> list[torch.Tensor]:
    return [
        matrix
        for layer in layers_of(module)
        for number in range(layer.expert_count)
        for matrix in matrices(module, layer, number)
    ]


@pytest.mark.parametrize("criterion", list(Criterion))
@pytest.mark.parametrize("pattern", ["2:4", "1:2"])
def test_every_aligned_block_keeps_n_weights(mixtral: Module, criterion: Criterion, pattern: str) -> None:
    """V10, and V16: the same again changes nothing."""
    options = f"pattern={pattern} criterion={criterion.value} steps=3"
    once = sparse(mixtral, options)
    kept, block = map(int, pattern.split(":"))
    for matrix in all_matrices(once):
        counts = (matrix.reshape(len(matrix), -1, block) != 0).sum(-1)
        assert bool((counts == kept).all())
    assert output(once).isfinite().all()
    again = sparse(once, options)
    for one, other in zip(all_matrices(once), all_matrices(again), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        assert torch.equal(one == 0, other == 0)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "gate-wanda"])
def test_scores_decide_and_weights_that_stay_are_as_they_were(mixtral: Module, criterion: str) -> None:
    assert mixtral.calibration is not None
    after = sparse(mixtral, f"pattern=unstructured ratio=0.25 criterion={criterion}")
    layer, new = layers_of(mixtral)[0], layers_of(after)[0]
    sample = mixtral.calibration.sample(layer)
    for number in range(layer.expert_count):
        rows, gates = sample.chosen(layer, number)
        expert = load_expert(layer, mixtral.weights, number)
        assert isinstance(expert, FeedForward)
        weights = gates.square() if criterion == "gate-wanda" else torch.ones_like(gates)
        x = sample.x[rows].float()
        norms = [(weights @ given.double().square()).sqrt() for given in (x, x, expert.hidden_activations(x))]
        before = matrices(mixtral, layer, number)
        for matrix, pruned, norm in zip(before, matrices(after, new, number), norms, strict=True):
            scores = matrix.abs().double() * (1.0 if criterion == "magnitude" else norm)
            gone = pruned == 0
            assert torch.equal(gone.sum(1), torch.full((len(matrix),), matrix.shape[1] // 4))
            highest = scores.masked_fill(~gone, 0.0).amax(1)
            lowest = scores.masked_fill(gone, torch.inf).amin(1)
            assert bool((highest <= lowest * (1 + 1e-6)).all())
            assert torch.equal(pruned[~gone], matrix[~gone])


def test_global_magnitude_takes_the_lowest_of_all(mixtral: Module) -> None:
    after = sparse(mixtral, "pattern=global ratio=0.3")
    before = torch.cat([matrix.flatten() for matrix in all_matrices(mixtral)])
    pruned = torch.cat([matrix.flatten() for matrix in all_matrices(after)])
    gone = pruned == 0
    assert int(gone.sum()) == int(0.3 * before.numel())
    assert before[gone].abs().amax() <= before[~gone].abs().amin()
    assert torch.equal(before[~gone], pruned[~gone])


@pytest.mark.parametrize("options", ["pattern=global ratio=0", "pattern=unstructured ratio=0", "pattern=4:4"])
def test_nothing_to_remove_changes_nothing(mixtral: Module, options: str) -> None:
    """V1."""
    assert sparse(mixtral, options).print() == mixtral.print()


def test_second_order_is_nearer_to_the_outputs(mixtral: Module) -> None:
    before = output(mixtral)
    errors = {
        criterion: float((output(sparse(mixtral, f"criterion={criterion}")) - before).square().sum())
        for criterion in ("magnitude", "sparsegpt", "gate-sparsegpt")
    }
    assert max(errors["sparsegpt"], errors["gate-sparsegpt"]) < errors["magnitude"]


def test_learned_masks_begin_at_a_prior_and_are_kept_where_they_are_better(mixtral: Module) -> None:
    layer = layers_of(mixtral)[0]
    expert = load_expert(layer, mixtral.weights, 1)
    assert isinstance(expert, FeedForward)
    # inputs of unlike size, of which magnitudes of weights know nothing
    sizes = torch.rand(layer.hidden_size, generator=torch.Generator().manual_seed(2)).square()
    rows = 2 * sizes * torch.randn(400, layer.hidden_size, generator=torch.Generator().manual_seed(1))
    gates, held = torch.linspace(0.2, 1, 400, dtype=torch.float64), torch.arange(400) % 4 == 0
    pattern = BlockPattern(2, 4)
    weights = zip(Matrix, matrices(mixtral, layer, 1), strict=True)
    prior = {matrix: pattern.mask(weight.abs()) for matrix, weight in weights}

    def learned(strength: float, steps: int) -> LearnedMasks:
        generator = torch.Generator().manual_seed(0)
        given = (expert, prior, pattern, rows, gates, held)
        return learn_masks(*given, steps=steps, strength=strength, generator=generator)

    found = learned(3.0, 80)
    assert found.after < 0.9 * found.before
    for mask in found.masks.values():
        assert bool((mask.reshape(len(mask), -1, 4).sum(-1) == 2).all())
    strong = learned(1e6, 10)
    assert strong.after == strong.before == found.before
    assert all(torch.equal(strong.masks[matrix], prior[matrix]) for matrix in Matrix)
    wanted = expert.apply(rows)
    errors = gates[:, None] * (masked(expert, found.masks).apply(rows) - wanted)
    share = errors[held].square().sum() / (gates[:, None] * wanted)[held].square().sum()
    assert float(share) == pytest.approx(found.after, rel=1e-5)


def test_protected_experts_stay_and_the_report_claims_no_bytes(mixtral: Module) -> None:
    """V11."""
    module = copy_of(mixtral)
    protect_experts(layers_of(module)[0], [2])
    before = matrices(module, layers_of(module)[0], 2)
    report = report_of(module, "")
    for one, other in zip(before, matrices(module, layers_of(module)[0], 2), strict=True):
        assert torch.equal(one, other)
    statistics = report.records[0].statistics
    total = sum(matrix.numel() for matrix in all_matrices(mixtral))
    assert statistics["weights"] == total - sum(matrix.numel() for matrix in before)
    assert statistics["zeros"] == statistics["weights"] // 2
    assert "they take as many bytes as before" in report.explanation_text()


def test_an_expert_without_tokens_is_pruned_by_magnitude(mixtral: Module, tmp_path: Path) -> None:
    module = copy_of(mixtral)
    moec.run_passes(module, calibrate_text(tmp_path, rows=1, length=2))
    calibration = module.calibration
    assert calibration is not None
    layer = layers_of(module)[0]
    number = int((calibration.statistics(layer).count == 0).nonzero()[0, 0])
    by_magnitude = matrices(*(lambda other: (other, layers_of(other)[0]))(sparse(mixtral, "")), number)
    report = report_of(module, "criterion=sparsegpt")
    assert report.records[0].statistics["unrouted"] > 0
    for one, other in zip(matrices(module, layers_of(module)[0], number), by_magnitude, strict=True):
        assert torch.equal(one, other)


def test_factored_experts_are_left_with_the_reason(mixtral: Module) -> None:
    module = copy_of(mixtral)
    layer = layers_of(module)[0]
    expert = load_expert(layer, module.weights, 0)
    assert isinstance(expert, FeedForward)
    u, s, v = torch.linalg.svd(expert.up.dense(), full_matrices=False)
    replace_experts(layer, module.weights, {0: replace(expert, up=replace(expert.up, matrix=LowRank(u * s, v)))})
    report = report_of(module, "")
    assert "stored expert 0: its matrices are factored" in report.explanation_text()
    assert not bool((matrices(module, layers_of(module)[0], 0)[0] == 0).any())


def test_damaged_and_unfitting_matrices_are_refused(mixtral: Module) -> None:
    module = copy_of(mixtral)
    layer = layers_of(module)[0]
    expert = load_expert(layer, module.weights, 3)
    assert isinstance(expert, FeedForward)
    broken = replace(expert.down, matrix=Dense(torch.full_like(expert.down.dense(), torch.nan)))
    replace_experts(layer, module.weights, {3: replace(expert, down=broken)})
    with pytest.raises(UnsafeInputError, match=r"holds NaN or infinity.*down of expert 3"):
        sparse(module, "")
    with pytest.raises(UsageError, match=r"do not divide into blocks of 7.*round-to=7"):
        sparse(mixtral, "pattern=3:7")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("pattern=4:2", r"no pattern n:m with 0 < n <= m, nor unstructured or global"),
        ("pattern=globally", "nor unstructured or global"),
        ("ratio=1", "not within 0 <= ratio < 1"),
        ("damping=0", "not above 0"),
        ("pattern=unstructured criterion=learned", "need a pattern n:m"),
        ("pattern=6:16 criterion=learned", "at most 70 ways"),
        ("steps=0", "at least 1"),
        ("pattern=global criterion=sparsegpt", "cannot be compared, as global needs"),
    ],
)
def test_options_that_cannot_be(mixtral: Module, options: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        sparse(mixtral, options)
