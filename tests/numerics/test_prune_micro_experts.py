"""prune-micro-experts on tiny models: the scores against their formulas, and cut experts against masked ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moec
from moec.errors import UsageError
from moec.experts import (
    Constant,
    Dense,
    DenseLayer,
    FeedForward,
    LowRank,
    MoeLayer,
    Projection,
    find_dense_layers,
    find_moe_layers,
    load_dense,
    load_expert,
    protect_experts,
    replace_dense,
    replace_experts,
)
from moec.module import Module
from moec.passes.neuron_pruning.scores import Criterion, NeuronScorer
from moec.passes.neuron_pruning.selection import Scope
from moec.pipeline.manager import PassManager, Pipeline
from moec.pipeline.spec import PipelineError
from tests.experts.models import calibrate_text, copy_of, difference, output, raised_model

# new tensors are stored in float32
STORED = 1e-6


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Module:
    folder = tmp_path_factory.mktemp("mixtral")
    module = raised_model("mixtral", folder)
    moec.run_passes(module, calibrate_text(folder, options="gradients"))
    return module


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Module:
    """Experts with biases and a clamped activation."""
    folder = tmp_path_factory.mktemp("gpt_oss")
    module = raised_model("gpt_oss", folder)
    moec.run_passes(module, calibrate_text(folder))
    return module


def pruned(source: Module, options: str, seed: int = 0) -> Module:
    module = copy_of(source)
    moec.run_passes(module, f"prune-micro-experts{{{options}}}", seed=seed)
    return module


def layers_of(module: Module) -> tuple[MoeLayer, ...]:
    return find_moe_layers(module.op)


def feed_forward(layer: MoeLayer, module: Module, number: int) -> FeedForward:
    expert = load_expert(layer, module.weights, number)
    assert isinstance(expert, FeedForward)
    return expert


def widths(module: Module) -> list[list[int]]:
    return [
        [feed_forward(layer, module, number).width for number in range(layer.expert_count)]
        for layer in layers_of(module)
    ]


def kept_neurons(before: FeedForward, after: FeedForward) -> list[int]:
    """The neurons of `before` that are left, by their rows of up."""
    old, new = before.up.dense(), after.up.dense()
    return [int((old == row).all(1).nonzero()[0, 0]) for row in new]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_cut_experts_compute_what_masked_ones_do(name: str, request: pytest.FixtureRequest) -> None:
    """V7: a column of down that is zero is a neuron that is not there."""
    source: Module = request.getfixturevalue(name)
    result = pruned(source, "ratio=0.4 scope=global")
    masked = copy_of(source)
    for before, after in zip(layers_of(masked), layers_of(result), strict=True):
        new = {}
        for number in range(before.expert_count):
            expert = feed_forward(before, masked, number)
            mask = torch.zeros(expert.width)
            mask[kept_neurons(expert, feed_forward(after, result, number))] = 1.0
            down = replace(expert.down, matrix=Dense(expert.down.dense() * mask))
            new[number] = replace(expert, down=down)
        replace_experts(before, masked.weights, new)
    assert len({width for layer in widths(result) for width in layer}) > 1
    assert difference(output(masked), output(result)) < 1e-12


@pytest.mark.parametrize("criterion", list(Criterion))
@pytest.mark.parametrize("scope", list(Scope))
def test_no_ratio_changes_nothing(mixtral: Module, criterion: Criterion, scope: Scope) -> None:
    """V1."""
    result = pruned(mixtral, f"ratio=0 criterion={criterion.value} scope={scope.value}")
    assert result.print() == mixtral.print()


@pytest.mark.parametrize("scope", list(Scope))
def test_so_many_neurons_go(mixtral: Module, scope: Scope) -> None:
    total = sum(map(sum, widths(mixtral)))
    left = widths(pruned(mixtral, f"ratio=0.25 scope={scope.value}"))
    assert sum(map(sum, left)) == total * 3 // 4
    if scope is Scope.EXPERT:
        assert len({width for layer in left for width in layer}) == 1
    if scope is Scope.LAYER:
        assert len({sum(layer) for layer in left}) == 1


def test_scores_are_what_their_formulas_say(mixtral: Module) -> None:
    assert mixtral.calibration is not None
    layer = layers_of(mixtral)[1]
    sample = mixtral.calibration.sample(layer)
    assert sample.gradient is not None
    number = 2
    expert = feed_forward(layer, mixtral, number)
    rows, gates = sample.chosen(layer, number)
    down = expert.down.dense().double()
    phi = expert.hidden_activations(sample.x[rows].float()).double()
    gated = phi * gates[:, None]
    towards = gates[:, None] * (sample.gradient[rows].double() @ down)
    moment = sum(g * g * torch.outer(v, v) for g, v in zip(gates, sample.gradient[rows].double(), strict=True))
    assert isinstance(moment, torch.Tensor)
    columns = down.square().sum(0)
    mean_square, along = phi.square().mean(0), torch.einsum("hi,hk,ki->i", down, moment, down) / len(rows)
    sensitivity = mixtral.calibration.statistics(layer).layer_gradient_energy
    assert sensitivity is not None and sensitivity > 0
    expected = {
        Criterion.CAMERA: columns * (0.75 * gated.square().sum(0) + 0.25 * gated.abs().amax(0).square()),
        Criterion.ENERGY_X_SENSITIVITY: sensitivity * columns * gated.square().sum(0),
        Criterion.HEAPR: mean_square * along,
        Criterion.HEAPR_SUM: len(rows) * mean_square * along,
        Criterion.FISHER: (phi * towards).square().sum(0),
        Criterion.TAYLOR: (phi * towards).sum(0).abs(),
        Criterion.MAGNITUDE: torch.cat([expert.up.dense(), feed_forward_gate(expert)], 1).double().square().sum(1)
        + columns,
    }
    for criterion, scores in expected.items():
        found = NeuronScorer(criterion, mixtral.calibration, alpha=0.25).scores(layer, number, expert)
        torch.testing.assert_close(found, scores, rtol=1e-5, atol=0.0)


def feed_forward_gate(expert: FeedForward) -> torch.Tensor:
    assert expert.gate is not None
    return expert.gate.dense()


def test_random_choices_follow_the_seed(mixtral: Module) -> None:
    first = pruned(mixtral, "ratio=0.5 criterion=random", seed=1)
    assert pruned(mixtral, "ratio=0.5 criterion=random", seed=1).print() == first.print()
    assert pruned(mixtral, "ratio=0.5 criterion=random", seed=2).print() != first.print()


def test_multiples_and_least_widths(mixtral: Module) -> None:
    plain = widths(pruned(mixtral, "ratio=0.6 scope=global"))
    rounded = widths(pruned(mixtral, "ratio=0.6 scope=global round-to=4"))
    for one, other in zip(plain, rounded, strict=True):
        assert other == [-(-width // 4) * 4 for width in one]
    least = widths(pruned(mixtral, "ratio=0.6 scope=global min-width=10"))
    assert min(width for layer in least for width in layer) >= 10


def test_protected_experts_stay_bit_for_bit(mixtral: Module) -> None:
    """V11."""
    module = copy_of(mixtral)
    protect_experts(layers_of(module)[0], [3])
    before = feed_forward(layers_of(module)[0], module, 3)
    moec.run_passes(module, "prune-micro-experts{ratio=0.5}")
    after = feed_forward(layers_of(module)[0], module, 3)
    assert torch.equal(before.up.dense(), after.up.dense()) and torch.equal(before.down.dense(), after.down.dense())
    assert layers_of(module)[0].protected == {3}
    assert sum(widths(module)[0]) == sum(widths(mixtral)[0]) // 2


def test_protection_beyond_the_ratio_is_refused_with_the_largest_one(mixtral: Module) -> None:
    module = copy_of(mixtral)
    for layer in layers_of(module):
        protect_experts(layer, range(4))
    with pytest.raises(UsageError, match=r"are those of protected experts.*a ratio of at most 0\.4"):
        moec.run_passes(module, "prune-micro-experts{ratio=0.7}")


def change_expert(source: Module, number: int, factor: float) -> Module:
    """The model with all weights of one expert of the first layer multiplied."""
    module = copy_of(source)
    layer = layers_of(module)[0]
    expert = feed_forward(layer, module, number)

    def scaled(projection: Projection) -> Projection:
        return replace(projection, matrix=Dense(projection.dense() * factor))

    assert expert.gate is not None
    changed = replace(expert, gate=scaled(expert.gate), up=scaled(expert.up), down=scaled(expert.down))
    replace_experts(layer, module.weights, {number: changed})
    return module


@pytest.mark.parametrize("criterion", ["camera", "heapr-sum", "magnitude"])
def test_an_expert_of_zeros_loses_all_but_the_least_width(mixtral: Module, criterion: str) -> None:
    zeros = change_expert(mixtral, 1, 0.0)
    result = pruned(zeros, f"ratio=0.5 criterion={criterion}")
    assert widths(result)[0][1] == 1
    gone = pruned(zeros, f"ratio=0.5 criterion={criterion} min-width=0")
    layer = layers_of(gone)[0]
    assert (layer.expert_count, layer.stored.count(-1)) == (7, 1)
    assert output(gone).isfinite().all()


def test_an_expert_without_neurons_is_its_bias(gpt_oss: Module) -> None:
    module = copy_of(gpt_oss)
    experts = [feed_forward(layer, module, 0) for layer in layers_of(module)]
    for layer, expert in zip(layers_of(module), experts, strict=True):
        dead = replace(expert, down=replace(expert.down, matrix=Dense(torch.zeros_like(expert.down.dense()))))
        replace_experts(layer, module.weights, {0: dead})
    before = output(module)
    moec.run_passes(module, f"prune-micro-experts{{ratio={1 / layers_of(module)[0].expert_count} min-width=0}}")
    for layer, expert in zip(layers_of(module), experts, strict=True):
        after = load_expert(layer, module.weights, 0)
        assert isinstance(after, Constant) and expert.down.bias is not None
        assert torch.equal(after.value, expert.down.bias)
    assert difference(before, output(module)) < STORED


def test_weights_that_are_no_numbers_are_refused(mixtral: Module) -> None:
    damaged = change_expert(mixtral, 5, float("nan"))
    with pytest.raises(UsageError, match="expert 5 are not finite"):
        moec.run_passes(damaged, "prune-micro-experts{ratio=0.5 criterion=magnitude}")


def test_experts_that_no_token_chose_are_reported_and_keep_the_least_width(mixtral: Module, tmp_path: Path) -> None:
    """V15: two tokens cannot reach all experts."""
    module = copy_of(mixtral)
    moec.run_passes(module, calibrate_text(tmp_path, rows=1, length=2))
    calibration = module.calibration
    assert calibration is not None
    unrouted = sum(int((calibration.statistics(layer).count == 0).sum()) for layer in layers_of(module))
    report = PassManager(Pipeline.parse("prune-micro-experts{ratio=0.5 min-width=2}")).run(
        module.op, weights=module.weights, module=module
    )
    assert report.records[0].statistics["unrouted"] == unrouted > 0
    assert "no calibration token chose" in report.explanation_text()
    assert min(width for layer in widths(module) for width in layer) == 2
    assert output(module).isfinite().all()


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Module:
    """A block beside the experts that every token runs."""
    folder = tmp_path_factory.mktemp("deepseek")
    module = raised_model("deepseek_v3", folder)
    moec.run_passes(module, calibrate_text(folder, options="gradients"))
    return module


def beside(module: Module) -> list[DenseLayer]:
    return [block for block in find_dense_layers(module.op) if block.is_beside_experts]


@pytest.mark.parametrize("criterion", ["camera", pytest.param("heapr-sum", marks=pytest.mark.slow)])
def test_neurons_of_shared_experts_are_ranked_with_the_others(deepseek: Module, criterion: str) -> None:
    options = f"ratio=0.5 criterion={criterion} alpha={0.5 if criterion == 'camera' else 0} shared"
    result = pruned(deepseek, options)
    assert deepseek.calibration is not None
    masked = copy_of(deepseek)
    for layer, after, old, new in zip(
        layers_of(masked), layers_of(result), beside(masked), beside(result), strict=True
    ):
        whole, cut = load_dense(old, masked.weights), load_dense(new, result.weights)
        experts = [feed_forward(layer, masked, number) for number in range(layer.expert_count)]
        left = [feed_forward(after, result, number) for number in range(layer.expert_count)]
        total = whole.width + sum(expert.width for expert in experts)
        assert cut.width + sum(expert.width for expert in left) == total - total // 2
        scorer = NeuronScorer(Criterion(criterion), deepseek.calibration, alpha=0.5 if criterion == "camera" else 0.0)
        scores = [scorer.scores(layer, number, expert) for number, expert in enumerate(experts)]
        scores.append(scorer.scores_beside(layer, whole))
        kept = [kept_neurons(*pair) for pair in zip([*experts, whole], [*left, cut], strict=True)]
        # a single neuron may be there only because an expert keeps one
        stay = torch.cat([score[keep] for score, keep in zip(scores, kept, strict=True) if len(keep) > 1])
        assert float(stay.min()) >= float(torch.cat(scores).sort().values[total // 2])
        mask = torch.zeros(whole.width)
        mask[kept[-1]] = 1.0
        replace_dense(old, masked.weights, _masked(whole, mask))
        masks = {number: torch.zeros(expert.width) for number, expert in enumerate(experts)}
        for number, mask in masks.items():
            mask[kept[number]] = 1.0
        replace_experts(layer, masked.weights, {n: _masked(experts[n], mask) for n, mask in masks.items()})
    assert difference(output(masked), output(result)) < 1e-12


def _masked(expert: FeedForward, mask: torch.Tensor) -> FeedForward:
    return replace(expert, down=replace(expert.down, matrix=Dense(expert.down.dense() * mask)))


def test_scores_of_shared_experts_are_those_of_experts_with_gate_one(deepseek: Module) -> None:
    assert deepseek.calibration is not None
    layer, block = layers_of(deepseek)[0], load_dense(beside(deepseek)[0], deepseek.weights)
    sample = deepseek.calibration.sample(layer)
    phi = block.hidden_activations(sample.x.float()).double()
    columns = block.down.dense().double()
    scale = deepseek.calibration.statistics(layer).tokens / len(sample)
    expected = columns.square().sum(0) * phi.square().sum(0) * scale
    found = NeuronScorer(Criterion.CAMERA, deepseek.calibration).scores_beside(layer, block)
    torch.testing.assert_close(found, expected)
    assert sample.gradient is not None
    along = sample.gradient.double() @ columns
    found = NeuronScorer(Criterion.FISHER, deepseek.calibration).scores_beside(layer, block)
    torch.testing.assert_close(found, (along * phi).square().sum(0))


@pytest.mark.slow
def test_a_shared_expert_behind_a_gate_is_left(tmp_path: Path) -> None:
    module = raised_model("qwen2_moe", tmp_path)
    report = moec.run_passes(module, f"{calibrate_text(tmp_path)},prune-micro-experts{{ratio=0.5 shared}}")
    (refusal, *_) = report.records[-1].refusals
    assert "a gate of its own" in str(refusal)


def test_low_rank_experts_are_cut_and_shared_bases_are_left(mixtral: Module) -> None:
    module = copy_of(mixtral)
    layer = layers_of(module)[0]
    expert = feed_forward(layer, module, 0)

    def factored(projection: Projection, base: torch.Tensor | None) -> Projection:
        u, s, v = torch.linalg.svd(projection.dense() - (0 if base is None else base), full_matrices=False)
        return replace(projection, matrix=LowRank(u * s, v, base))

    base = torch.ones_like(expert.up.dense())
    new = {0: replace(expert, up=factored(expert.up, None), down=factored(expert.down, None))}
    based = feed_forward(layer, module, 1)
    new[1] = replace(based, up=factored(based.up, base))
    replace_experts(layer, module.weights, new)
    report = PassManager(Pipeline.parse("prune-micro-experts{ratio=0.5 scope=expert}")).run(
        module.op, weights=module.weights, module=module
    )
    after = feed_forward(layers_of(module)[0], module, 0)
    assert isinstance(after.up.matrix, LowRank) and after.width == expert.width // 2
    assert feed_forward(layers_of(module)[0], module, 1).width == based.width
    assert "its up matrix has a base that other experts share" in report.explanation_text()
    kept = kept_neurons(replace(expert, up=new[0].up), after)
    rows = torch.randn(5, layers_of(module)[0].hidden_size)
    part = new[0].hidden_activations(rows)[:, kept] @ new[0].down.dense()[:, kept].T
    torch.testing.assert_close(after.apply(rows), part, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("ratio=1", "not within 0 <= ratio < 1"),
        ("ratio=-0.1", "not within 0 <= ratio < 1"),
        ("ratio=nan", "not within 0 <= ratio < 1"),
        ("ratio=0.5 alpha=2", "alpha 2 is not within"),
        ("ratio=0.5 round-to=0", "round-to must be at least 1"),
        ("ratio=0.5 min-width=-1", "min-width must not be negative"),
        ("ratio=0.5 shared min-width=0", "shared experts keep at least one neuron"),
    ],
)
def test_options_that_cannot_be(mixtral: Module, options: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        pruned(mixtral, options)


@pytest.mark.parametrize("criterion", ["energy-x-sensitivity", "fisher"])
def test_gradients_that_are_missing_are_asked_for(gpt_oss: Module, criterion: str) -> None:
    with pytest.raises(UsageError, match=r"needs gradients.*calibrate\{gradients\}"):
        pruned(gpt_oss, f"ratio=0.5 criterion={criterion}")
