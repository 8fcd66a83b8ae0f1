"""low-rank on tiny models: what is factored, what stays, of which size, and how far the model moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moec
from moec.dialects.builtin import WeightOp
from moec.errors import UsageError
from moec.experts import (
    Dense,
    FeedForward,
    LowRank,
    MoeLayer,
    PartlyLowRank,
    Projection,
    find_moe_layers,
    load_expert,
    protect_experts,
    replace_experts,
    replace_router,
)
from moec.module import Module
from moec.passes.factoring.sides import Side, dense_matrix, projection
from moec.passes.factoring.whitening import whitening
from moec.pipeline.manager import PipelineReport
from tests.experts.models import calibrate_text, copy_of, difference, output, raised_model

HIDDEN, WIDTH, EXPERTS = 32, 48, 4
STORED = 2e-6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Module:
    folder = tmp_path_factory.mktemp("mixtral")
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_local_experts": EXPERTS}
    module = raised_model("mixtral", folder, **sizes)
    moec.run_passes(module, calibrate_text(folder, options="gradients=true"))
    return module


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Module:
    folder = tmp_path_factory.mktemp("gpt_oss")
    module = raised_model("gpt_oss", folder)
    moec.run_passes(module, calibrate_text(folder))
    return module


def run(source: Module, options: str) -> tuple[Module, PipelineReport]:
    module = copy_of(source)
    return module, moec.run_passes(module, f"low-rank{{{options}}}")


def statistics(report: PipelineReport) -> dict[str, int]:
    return report.records[0].statistics


def remarks(report: PipelineReport) -> str:
    return "\n".join(str(remark) for record in report.records for remark in record.remarks)


def experts_of(module: Module, layer: MoeLayer | None = None) -> list[FeedForward]:
    layer = layer or find_moe_layers(module.op)[0]
    found = [load_expert(layer, module.weights, number, torch.float64) for number in range(layer.expert_count)]
    assert all(isinstance(expert, FeedForward) for expert in found)
    return [expert for expert in found if isinstance(expert, FeedForward)]


def change(source: Module, new: dict[int, Callable[[FeedForward], FeedForward]]) -> Module:
    """The first layer with some experts changed."""
    module = copy_of(source)
    layer = find_moe_layers(module.op)[0]
    changed = {}
    for number, function in new.items():
        expert = load_expert(layer, module.weights, number)
        assert isinstance(expert, FeedForward)
        changed[number] = function(expert)
    replace_experts(layer, module.weights, changed)
    return module


def with_up(expert: FeedForward, matrix: torch.Tensor) -> FeedForward:
    return replace(expert, up=Projection(Dense(matrix), expert.up.bias))


@pytest.mark.parametrize("basis", ["plain", "whitened", "gate-whitened"])
@pytest.mark.parametrize("split", ["sqrt", "left", "right"])
def test_the_parameters_are_those_of_the_ratio(source: Module, basis: str, split: str) -> None:
    module, report = run(source, f"ratio=0.5 basis={basis} split={split}")
    rank = int(0.5 * HIDDEN * WIDTH / (HIDDEN + WIDTH))
    layers = find_moe_layers(module.op)
    for expert in experts_of(module):
        for side in Side:
            found = projection(expert, side)
            assert found is not None and isinstance(found.matrix, LowRank) and found.matrix.rank == rank
    assert len(layers[0].experts.classes) == 1
    counted = statistics(report)
    assert counted["factored"] == 3 * EXPERTS * len(layers)
    assert counted["before"] == 3 * EXPERTS * len(layers) * HIDDEN * WIDTH
    assert counted["after"] == 3 * EXPERTS * len(layers) * rank * (HIDDEN + WIDTH)
    assert 0.01 < difference(output(source), output(module)) < 2
    assert f"gate to rank {rank}, which loses" in remarks(report)


def test_a_whitened_basis_loses_least_of_what_a_matrix_computes(source: Module) -> None:
    assert source.calibration is not None
    plain, whitened = (experts_of(run(source, f"rank=6 basis={basis} damping=0")[0]) for basis in ("plain", "whitened"))
    layer = find_moe_layers(source.op)[0]
    sample = source.calibration.sample(layer)
    for number, expert in enumerate(experts_of(source)):
        rows = sample.x[sample.chosen(layer, number)[0]].double()
        norms = {Side.GATE: rows, Side.UP: rows, Side.DOWN: expert.hidden_activations(rows)}
        for side, inputs in norms.items():
            dense = dense_matrix(expert, side)
            norm = whitening(inputs.T @ inputs)
            assert norm is not None
            one, other = (dense - dense_matrix(each[number], side) for each in (plain, whitened))
            assert norm.error(other) <= norm.error(one) * (1 + 1e-6)
            assert one.square().sum() <= other.square().sum() * (1 + 1e-6)


def test_a_rank_that_saves_nothing_changes_no_bit(source: Module) -> None:
    module, report = run(source, f"rank={HIDDEN}")
    assert torch.equal(output(source), output(module))
    counted = statistics(report)
    assert counted["before"] == counted["after"] and counted["factored"] == 0
    assert counted["whole"] == 3 * EXPERTS * len(find_moe_layers(module.op))


def test_all_energy_is_all_of_the_function(source: Module) -> None:
    def of_rank_3(expert: FeedForward) -> FeedForward:
        u, s, v = torch.linalg.svd(expert.up.dense(), full_matrices=False)
        return with_up(expert, (u[:, :3] * s[:3]) @ v[:3])

    changed = change(source, dict.fromkeys(range(EXPERTS), of_rank_3))
    module, _ = run(changed, "energy=0.9999999 sides=up basis=plain")
    ranks = [expert.up.matrix.rank for expert in experts_of(module) if isinstance(expert.up.matrix, LowRank)]
    assert ranks == [3] * EXPERTS
    assert difference(output(changed), output(module)) < 1e-3


def test_more_energy_is_more_rank_and_less_error(source: Module) -> None:
    errors = []
    for energy in (0.5, 0.8, 0.95):
        module, _ = run(source, f"energy={energy}")
        errors.append(difference(output(source), output(module)))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("base", ["frequency", "fisher"])
def test_a_base_is_stored_once_and_counted_in_the_ratio(source: Module, base: str) -> None:
    module, report = run(source, f"ratio=0.6 base={base}")
    layers = find_moe_layers(module.op)
    counted = statistics(report)
    assert counted["after"] <= 0.6 * counted["before"] < counted["after"] + len(layers) * 3 * EXPERTS * (HIDDEN + WIDTH)
    bases = [expert.up.matrix.base for expert in experts_of(module) if isinstance(expert.up.matrix, LowRank)]
    assert len(bases) == EXPERTS and all(one is not None and torch.equal(one, bases[0]) for one in bases)  # type: ignore[arg-type]
    [group] = layers[0].experts.classes
    assert group.shared == 3


def test_the_base_is_the_mean_by_use(source: Module) -> None:
    assert source.calibration is not None
    layer = find_moe_layers(source.op)[0]
    counts = source.calibration.statistics(layer).count
    mean = (
        sum(count * expert.up.dense() for count, expert in zip(counts, experts_of(source), strict=True)) / counts.sum()
    )
    matrix = experts_of(run(source, "rank=2 base=frequency")[0])[0].up.matrix
    assert isinstance(matrix, LowRank) and matrix.base is not None
    assert difference(mean, matrix.base) < STORED


def test_equal_experts_are_their_base(source: Module) -> None:
    first = load_expert(find_moe_layers(source.op)[0], source.weights, 0)
    assert isinstance(first, FeedForward)
    equal = change(source, {number: lambda _: first for number in range(EXPERTS)})
    module = copy_of(equal)
    # other layers are left as they are
    for layer in find_moe_layers(module.op)[1:]:
        protect_experts(layer, range(EXPERTS))
    module, _ = run(module, "rank=1 base=frequency")
    assert difference(output(equal), output(module)) < 1e-5


def test_some_neurons_stay_whole(source: Module) -> None:
    kept = round(0.25 * WIDTH)
    module, report = run(source, "rank=4 residual=0.25")
    alone, _ = run(source, "rank=4")
    for old, new in zip(experts_of(source), experts_of(module), strict=True):
        for side, axis in ((Side.GATE, 0), (Side.UP, 0), (Side.DOWN, 1)):
            found = projection(new, side)
            assert found is not None and isinstance(found.matrix, PartlyLowRank)
            whole = found.matrix.whole if axis == 0 else found.matrix.whole.T
            dense = dense_matrix(old, side) if axis == 0 else dense_matrix(old, side).T
            assert len(whole) == kept
            assert all((dense == row).all(1).any() for row in whole)
    counted = statistics(report)
    per_expert = 3 * kept * HIDDEN + 3 * 4 * (WIDTH - kept + HIDDEN)
    assert counted["after"] == len(find_moe_layers(module.op)) * EXPERTS * per_expert
    assert difference(output(source), output(module)) < difference(output(source), output(alone))


def test_the_residual_is_part_of_a_ratio(source: Module) -> None:
    _, report = run(source, "ratio=0.5 residual=0.1")
    counted = statistics(report)
    assert 0.42 * counted["before"] < counted["after"] <= 0.5 * counted["before"]


def test_biases_and_clamped_activations_stay(biased: Module) -> None:
    for options in ("rank=5", "rank=5 residual=0.3", "rank=5 base=frequency"):
        module, _ = run(biased, options)
        for old, new in zip(experts_of(biased), experts_of(module), strict=True):
            assert old.up.bias is not None and new.up.bias is not None and old.down.bias is not None
            assert torch.equal(old.up.bias.sort().values, new.up.bias.sort().values)
            assert new.down.bias is not None and torch.equal(old.down.bias, new.down.bias)
            assert new.activation == old.activation
        assert 1e-4 < difference(output(biased), output(module)) < 2


def test_protected_experts_keep_every_bit(source: Module) -> None:
    module = copy_of(source)
    for layer in find_moe_layers(module.op):
        protect_experts(layer, (1,))
    before = experts_of(module)[1]
    for options in ("rank=4", "rank=4 base=frequency", "rank=4 residual=0.2"):
        changed, report = run(module, options)
        after = experts_of(changed)
        assert torch.equal(after[1].up.dense(), before.up.dense()) and isinstance(after[1].up.matrix, Dense)
        assert not isinstance(after[0].up.matrix, Dense)
        assert find_moe_layers(changed.op)[0].protected == {1}
        assert statistics(report)["factored"] == 3 * (EXPERTS - 1) * len(find_moe_layers(module.op))


def test_the_second_time_changes_only_rounding(source: Module) -> None:
    once, _ = run(source, "rank=6")
    twice, _ = run(once, "rank=6")
    assert difference(output(once), output(twice)) < 1e-4


def test_an_expert_that_nobody_chose_is_factored_plainly(source: Module) -> None:
    module = copy_of(source)
    layer = find_moe_layers(module.op)[0]
    router = layer.router.tensor("weight").defining_op
    assert isinstance(router, WeightOp)
    replace_router(layer, module.weights, module.weights.load(router.source), torch.tensor([0.0, 0.0, -1e4, 0.0]))
    changed, report = run(module, "rank=6")
    plain, _ = run(module, "rank=6 basis=plain")
    assert "no token of the calibration text chose the experts 2: their basis is plain" in remarks(report)
    one, other = experts_of(changed)[2], experts_of(plain)[2]
    assert torch.allclose(one.up.dense(), other.up.dense(), atol=1e-6)
    assert not torch.allclose(experts_of(changed)[0].up.dense(), experts_of(plain)[0].up.dense(), atol=1e-3)


def test_an_expert_of_zeros_stays_zero(source: Module) -> None:
    zeros = change(
        source,
        {
            1: lambda expert: FeedForward(
                expert.activation,
                *(Projection(Dense(torch.zeros_like(dense_matrix(expert, side)))) for side in Side),
            )
        },
    )
    for options in ("rank=4", "energy=0.9", "ratio=0.5 base=frequency", "rank=4 residual=0.2"):
        module, _ = run(zeros, options)
        assert output(module).isfinite().all()
        if "base" not in options:
            assert all(not dense_matrix(experts_of(module)[1], side).any() for side in Side)


def test_weights_that_are_not_finite_are_named(source: Module) -> None:
    broken = change(source, {2: lambda expert: with_up(expert, expert.up.dense() * torch.nan)})
    with pytest.raises(UsageError, match="NaN or infinite") as error:
        run(broken, "rank=4 basis=plain")
    assert "expert 2, up" in error.value.where


def test_what_a_matrix_does_not_allow(source: Module) -> None:
    with pytest.raises(UsageError, match="rank 33 is above the full rank of a 48x32 matrix"):
        run(source, "rank=33 basis=plain")
    with pytest.raises(UsageError, match="too few for factors"):
        run(source, "ratio=0.04 basis=plain")
    with pytest.raises(UsageError, match="too small for a base that 4 experts share"):
        run(source, "ratio=0.25 base=frequency basis=plain")


def test_experts_of_unlike_widths_have_no_base(source: Module) -> None:
    def narrow(expert: FeedForward) -> FeedForward:
        assert expert.gate is not None
        gate, up = (Projection(Dense(item.dense()[:7])) for item in (expert.gate, expert.up))
        return replace(expert, gate=gate, up=up, down=Projection(Dense(expert.down.dense()[:, :7].contiguous())))

    ragged = change(source, {0: narrow})
    with pytest.raises(UsageError, match="different widths cannot share a base"):
        run(ragged, "rank=2 base=frequency basis=plain")
    module, _ = run(ragged, "rank=2")
    assert [expert.width for expert in experts_of(module)] == [7, WIDTH, WIDTH, WIDTH]


def test_gradients_are_needed_for_fisher(tmp_path: Path) -> None:
    module = raised_model("mixtral", tmp_path)
    moec.run_passes(module, calibrate_text(tmp_path))
    with pytest.raises(UsageError, match="needs gradients"):
        run(module, "rank=2 base=fisher")
