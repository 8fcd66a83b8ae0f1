"""prune-experts and protect-super-experts on tiny models: who goes, what becomes of it, and who may not."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch

import moec
from moec.errors import UsageError
from moec.experts import MoeLayer, find_moe_layers, load_expert, protect_experts, replace_experts, run_layer
from moec.experts.expert import Dense, FeedForward, Projection
from moec.module import Module
from moec.passes.expert_pruning.subset import SubsetErrors
from moec.pipeline.spec import PipelineError
from tests.experts.models import calibrate_text, copy_of, output, raised_model


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Module:
    folder = tmp_path_factory.mktemp("mixtral")
    module = raised_model("mixtral", folder)
    moec.run_passes(module, calibrate_text(folder))
    return module


def pruned(source: Module, options: str, seed: int = 0) -> Module:
    module = copy_of(source)
    moec.run_passes(module, f"prune-experts{{{options}}}", seed=seed)
    return module


def layers_of(module: Module) -> tuple[MoeLayer, ...]:
    return find_moe_layers(module.op)


def test_the_experts_with_the_largest_scores_stay(mixtral: Module) -> None:
    assert mixtral.calibration is not None
    result = pruned(mixtral, "keep=5")
    for before, after in zip(layers_of(mixtral), layers_of(result), strict=True):
        scores = mixtral.calibration.statistics(before).gated_norm_sum
        keep = sorted(scores.topk(5).indices.tolist())
        assert (after.outputs, after.expert_count) == (5, 5)
        for new, old in enumerate(keep):
            one, other = (load_expert(*pair, new_or_old) for pair, new_or_old in (
                ((after, result.weights), new), ((before, mixtral.weights), old),
            ))  # fmt: skip
            assert isinstance(one, FeedForward) and isinstance(other, FeedForward)
            assert torch.equal(one.up.dense(), other.up.dense())
    assert output(result).isfinite().all()


@pytest.mark.parametrize("criterion", ["frequency", "gate-mass", "activation-norm", "mean-activation-norm", "reap-mean",
                                       "output-energy", "mone", "leave-one-out", "naee-greedy", "random"])  # fmt: skip
def test_every_criterion_keeps_as_many_as_asked_and_nothing_changes_the_second_time(
    mixtral: Module, criterion: str
) -> None:
    once = pruned(mixtral, f"keep=4 criterion={criterion}")
    assert [layer.expert_count for layer in layers_of(once)] == [4, 4]
    again = pruned(once, f"keep=4 criterion={criterion}")
    assert again.print() == once.print()
    assert pruned(mixtral, f"ratio=0 criterion={criterion}").print() == mixtral.print()


def test_the_exact_search_finds_the_best_subset_and_the_greedy_one_nearly(mixtral: Module) -> None:
    assert mixtral.calibration is not None
    layer = layers_of(mixtral)[0]
    errors = SubsetErrors(layer, mixtral.calibration.sample(layer))
    best = min(errors.error(gone) for gone in combinations(range(8), 3))

    def error_of(criterion: str) -> float:
        after = layers_of(pruned(mixtral, f"keep=5 criterion={criterion}"))[0]
        kept = {_fingerprint(after, number) for number in range(5)}
        return errors.error([number for number in range(8) if _fingerprint(layer, number) not in kept])

    def _fingerprint(layer: MoeLayer, number: int) -> float:
        expert = load_expert(layer, mixtral.weights, number)
        assert isinstance(expert, FeedForward)
        return float(expert.up.dense().sum())

    assert error_of("naee-exact") == pytest.approx(best)
    assert best <= error_of("naee-greedy") <= error_of("random")


def test_the_error_of_no_loss_is_zero_and_of_too_much_infinite(mixtral: Module) -> None:
    assert mixtral.calibration is not None
    layer = layers_of(mixtral)[1]
    errors = SubsetErrors(layer, mixtral.calibration.sample(layer))
    assert errors.error(()) == 0
    assert errors.error(range(7)) == torch.inf


def test_a_constant_costs_what_the_statistics_predict(mixtral: Module) -> None:
    """V8: with the router as it was, the layer's squared error is the sum of g^2 ||f - c||^2."""
    assert mixtral.calibration is not None
    layer = layers_of(mixtral)[0]
    result = pruned(mixtral, "keep=7 on-drop=constant")
    after = layers_of(result)[0]
    (gone,) = [n for n in range(8) if type(load_expert(after, result.weights, n)).__name__ == "Constant"]
    sample = mixtral.calibration.sample(layer)
    rows, gates = sample.chosen(layer, gone)
    outputs = load_expert(layer, mixtral.weights, gone).apply(sample.x[rows]).double()
    predicted = float((gates.square() * (outputs - outputs.mean(0)).square().sum(1)).sum())
    y = run_layer(after, result.weights, sample.x, sample.router_input, torch.float64).y
    assert y is not None
    assert float((y - sample.y.double()).square().sum()) == pytest.approx(predicted, rel=1e-4)


def test_zero_and_redirect_leave_the_router_as_it_is(mixtral: Module) -> None:
    zero = layers_of(pruned(mixtral, "keep=6 on-drop=zero"))[0]
    assert (zero.outputs, zero.expert_count, zero.stored.count(-1)) == (8, 6, 2)
    redirected = layers_of(pruned(mixtral, "keep=6 on-drop=redirect"))[0]
    assert (redirected.outputs, redirected.expert_count) == (8, 6)
    assert -1 not in redirected.stored


def test_layers_compete_when_asked(mixtral: Module) -> None:
    result = pruned(mixtral, "ratio=0.5 scope=global criterion=gate-mass")
    counts = [layer.expert_count for layer in layers_of(result)]
    assert sum(counts) == 8
    assert min(counts) >= 2


def test_protected_experts_stay_at_any_ratio(mixtral: Module) -> None:
    assert mixtral.calibration is not None
    module = copy_of(mixtral)
    layer = layers_of(module)[0]
    scores = mixtral.calibration.statistics(layer).gated_norm_sum
    weakest = sorted(scores.topk(2, largest=False).indices.tolist())
    before = [load_expert(layer, module.weights, number).apply(torch.ones(1, 64)) for number in weakest]
    protect_experts(layer, weakest)
    result = pruned(module, "keep=3")
    after = layers_of(result)[0]
    assert len(after.protected) == 2
    for number, expected in zip(sorted(after.protected), before, strict=True):
        assert torch.equal(load_expert(after, result.weights, number).apply(torch.ones(1, 64)), expected)
    protect_experts(layers_of(module)[0], range(4))
    with pytest.raises(UsageError, match=r"3 of 8 experts would be left.* 5 are protected.*keep at least 5"):
        protect_experts(layers_of(module)[0], [4, *range(4)])
        pruned(module, "keep=3")


def test_routers_that_limit_groups_lose_equally_many_of_each(tmp_path: Path) -> None:
    module = raised_model("deepseek_v3", tmp_path)
    moec.run_passes(module, calibrate_text(tmp_path))
    groups = layers_of(module)[0].route.routing.groups
    result = pruned(module, "keep=4")
    layer = layers_of(result)[0]
    assert groups > 1 and layer.route.routing.groups == groups
    assert layer.outputs == 4 and layer.route.select_bias is not None
    assert output(result).isfinite().all()
    with pytest.raises(UsageError, match="cannot be spread evenly"):
        pruned(module, "keep=5")


def test_an_outlier_is_protected(mixtral: Module, tmp_path: Path) -> None:
    """V11 and the Super Experts: an expert with a huge output that few tokens choose."""
    module = copy_of(mixtral)
    layer = layers_of(module)[0]
    assert mixtral.calibration is not None
    rare = int(mixtral.calibration.statistics(layer).count.argmin())
    expert = load_expert(layer, module.weights, rare)
    assert isinstance(expert, FeedForward)
    outlier = FeedForward(expert.activation, expert.gate, expert.up, Projection(Dense(expert.down.dense() * 100)))
    replace_experts(layer, module.weights, {rare: outlier})
    moec.run_passes(module, f"{calibrate_text(tmp_path)},protect-super-experts{{percentile=90}}")
    assert rare in layers_of(module)[0].protected
    assert module.calibration is not None
    sample, errors = module.calibration.sample(layers_of(module)[0]), []
    for protected in (True, False):
        if not protected:
            layers_of(module)[0].experts.protected = ()
        result = layers_of(pruned(module, "keep=4 criterion=frequency on-drop=zero"))[0]
        assert bool(result.protected) is protected
        y = run_layer(result, module.weights, sample.x, sample.router_input).y
        assert y is not None
        errors.append(float((y - sample.y).square().sum()))
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("ratio=1", "ratio 1.0 is not within"),
        ("ratio=-0.1", "ratio -0.1 is not within"),
        ("keep=-1", "keep -1 is negative"),
        ("scope=global keep=3", "scope=global takes a ratio"),
        ("criterion=reap", "reap-mean"),
    ],
)
def test_bad_options_are_refused(mixtral: Module, options: str, message: str) -> None:
    with pytest.raises(PipelineError) as caught:
        pruned(mixtral, options)
    assert message in f"{caught.value.message} {caught.value.hint}"


def test_too_few_experts_and_no_calibration_are_refused(mixtral: Module) -> None:
    with pytest.raises(UsageError, match=r"1 of 8 experts would be left, but a token chooses 2.*keep at least 2"):
        pruned(mixtral, "keep=1")
    with pytest.raises(UsageError, match="calibrate"):
        module = copy_of(mixtral)
        module.calibration = None
        moec.run_passes(module, "prune-experts")
