"""latent-factorize on tiny models: one factor for a group, of the size that is said, exact where it can be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import moec
from moec.dialects.builtin import WeightOp
from moec.errors import UsageError
from moec.experts import (
    Dense,
    FeedForward,
    LowRank,
    Projection,
    find_moe_layers,
    load_expert,
    protect_experts,
    replace_experts,
    replace_router,
)
from moec.module import Module
from moec.passes.factoring.sides import Side, dense_matrix, projection
from moec.pipeline.manager import PassRecord
from tests.experts.models import calibrate_text, copy_of, difference, output, raised_model

HIDDEN, WIDTH, EXPERTS, LAYERS = 32, 48, 6, 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Module:
    folder = tmp_path_factory.mktemp("mixtral")
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_local_experts": EXPERTS}
    module = raised_model("mixtral", folder, **sizes)
    moec.run_passes(module, calibrate_text(folder))
    return module


def run(source: Module, options: str) -> tuple[Module, PassRecord]:
    module = copy_of(source)
    return module, moec.run_passes(module, f"latent-factorize{{{options}}}").records[0]


def experts_of(module: Module, layer: int = 0) -> list[FeedForward]:
    found = find_moe_layers(module.op)[layer]
    experts = [load_expert(found, module.weights, number) for number in range(found.expert_count)]
    assert all(isinstance(expert, FeedForward) for expert in experts)
    return [expert for expert in experts if isinstance(expert, FeedForward)]


def factors(expert: FeedForward, side: Side) -> LowRank:
    found = projection(expert, side)
    assert found is not None and isinstance(found.matrix, LowRank)
    return found.matrix


@pytest.mark.parametrize("group", [0, 2, 3])
@pytest.mark.parametrize("basis", ["plain", "gate-whitened"])
def test_a_group_stores_its_factor_once(source: Module, group: int, basis: str) -> None:
    module, record = run(source, f"rank=5 group={group} basis={basis} sides=gate,up,down")
    size = group or EXPERTS
    groups = EXPERTS // size
    layer = find_moe_layers(module.op)[0]
    assert [(len(kind.experts), kind.shared) for kind in layer.experts.classes] == [(size, 3)] * groups
    # k m r + r d for gate and up, whose right factor is shared, and the same for down, whose left one is
    per_group = 3 * (size * WIDTH * 5 + 5 * HIDDEN)
    assert record.statistics["after"] == LAYERS * groups * per_group
    assert record.statistics["before"] == LAYERS * EXPERTS * 3 * HIDDEN * WIDTH
    assert record.statistics["factored"] == LAYERS * groups * 3
    for number, expert in enumerate(experts_of(module)):
        first = experts_of(module)[number // size * size]
        assert torch.equal(factors(expert, Side.GATE).right, factors(first, Side.GATE).right)
        assert torch.equal(factors(expert, Side.DOWN).left, factors(first, Side.DOWN).left)
        assert not torch.equal(
            factors(experts_of(module)[0], Side.UP).left, factors(experts_of(module)[1], Side.UP).left
        )


def test_experts_in_one_latent_space_lose_nothing(source: Module) -> None:
    """Gates that read 5 directions only, and downs that write 5, are found at rank 5."""
    module = copy_of(source)
    reads, writes = (torch.linalg.qr(torch.randn(HIDDEN, 5)).Q for _ in range(2))
    for layer in find_moe_layers(module.op):
        new = {}
        for number in range(EXPERTS):
            expert = load_expert(layer, module.weights, number)
            assert isinstance(expert, FeedForward) and expert.gate is not None
            gate = Projection(Dense(expert.gate.dense() @ reads @ reads.T))
            new[number] = replace(expert, gate=gate, down=Projection(Dense(writes @ writes.T @ expert.down.dense())))
        replace_experts(layer, module.weights, new)
    for basis in ("plain", "whitened", "gate-whitened"):
        changed, _ = run(module, f"rank=5 sides=gate,down basis={basis}")
        assert difference(output(module), output(changed)) < 2e-5
    fewer, _ = run(module, "rank=4 sides=gate,down")
    assert difference(output(module), output(fewer)) > 1e-2


def test_the_ratio_is_that_of_the_factored_matrices(source: Module) -> None:
    _, record = run(source, "ratio=0.4 sides=up,down")
    counted = record.statistics
    kept = counted["after"] - LAYERS * EXPERTS * HIDDEN * WIDTH
    factored = LAYERS * EXPERTS * 2 * HIDDEN * WIDTH
    assert 0.4 * factored - LAYERS * 2 * (EXPERTS * WIDTH + HIDDEN) < kept <= 0.4 * factored


def test_more_energy_is_less_error(source: Module) -> None:
    before = output(source)
    errors = [float((output(run(source, f"energy={share}")[0]) - before).norm()) for share in (0.3, 0.95)]
    assert errors[0] > 1.5 * errors[1]


def test_two_phases_are_one_where_the_first_cuts_nothing(source: Module) -> None:
    once, _ = run(source, "rank=6 sides=gate,up,down")
    twice, _ = run(source, f"rank=6 sides=gate,up,down own-rank={HIDDEN}")
    cut, _ = run(source, "rank=6 sides=gate,up,down own-rank=3")
    assert difference(output(once), output(twice)) < 1e-4
    assert difference(output(once), output(cut)) > 1e-2


@pytest.mark.parametrize(("share", "rights", "lefts"), [("right", 1, EXPERTS), ("left", EXPERTS, 1)])
def test_either_factor_can_be_shared(source: Module, share: str, rights: int, lefts: int) -> None:
    module, _ = run(source, f"rank=4 share={share} sides=gate,down")
    for side in (Side.GATE, Side.DOWN):
        matrices = [factors(expert, side) for expert in experts_of(module)]
        assert len({tuple(matrix.right.flatten().tolist()) for matrix in matrices}) == rights
        assert len({tuple(matrix.left.flatten().tolist()) for matrix in matrices}) == lefts


def test_factors_that_would_be_larger_are_left_out(source: Module) -> None:
    module, record = run(source, f"rank={HIDDEN} group=2")
    assert torch.equal(output(source), output(module))
    assert record.statistics["whole"] == LAYERS * (EXPERTS // 2) * 2
    assert record.statistics["before"] == record.statistics["after"]


def test_protected_experts_are_in_no_group(source: Module) -> None:
    module = copy_of(source)
    for layer in find_moe_layers(module.op):
        protect_experts(layer, (1,))
    before = experts_of(module)[1]
    changed, _ = run(module, "rank=4 group=2")
    layer = find_moe_layers(changed.op)[0]
    assert sorted(kind.experts for kind in layer.experts.classes if kind.shared) == [(0, 2), (3, 4)]
    after = experts_of(changed)
    assert all(torch.equal(dense_matrix(after[1], side), dense_matrix(before, side)) for side in Side)
    # the fifth of five experts has nobody to share with
    assert isinstance(after[5].up.matrix, Dense)


def test_an_expert_that_nobody_chose_takes_the_norm_of_its_group(source: Module) -> None:
    module = copy_of(source)
    layer = find_moe_layers(module.op)[0]
    router = layer.router.tensor("weight").defining_op
    assert isinstance(router, WeightOp)
    bias = torch.zeros(EXPERTS).index_fill(0, torch.tensor([2]), -1e4)
    replace_router(layer, module.weights, module.weights.load(router.source), bias)
    changed, record = run(module, "rank=6 sides=gate,up,down")
    assert any("chose the experts 2: the norm is their group's" in remark.text for remark in record.remarks)
    assert output(changed).isfinite().all()
    whitened, plain = experts_of(changed)[2], experts_of(run(module, "rank=6 basis=plain")[0])[2]
    assert not torch.allclose(whitened.up.dense(), plain.up.dense(), atol=1e-3)


def test_experts_of_zeros_and_weights_that_are_not_finite(source: Module) -> None:
    def scaled(number: int, factor: float) -> Module:
        module = copy_of(source)
        layer = find_moe_layers(module.op)[0]
        expert = load_expert(layer, module.weights, number)
        assert isinstance(expert, FeedForward)
        up = Projection(Dense(expert.up.dense() * factor))
        replace_experts(layer, module.weights, {number: replace(expert, up=up)})
        return module

    zeros, _ = run(scaled(1, 0.0), "rank=4 sides=gate,up,down")
    assert output(zeros).isfinite().all() and not experts_of(zeros)[1].up.dense().any()
    with pytest.raises(UsageError, match="NaN or infinite") as error:
        run(scaled(3, torch.nan), "rank=4 basis=plain group=3")
    assert "experts 3 to 5, up" in error.value.where


def test_what_a_layer_does_not_allow(source: Module) -> None:
    with pytest.raises(UsageError, match="groups of 4 do not divide 6 experts"):
        run(source, "rank=4 group=4")
    with pytest.raises(UsageError, match="above the full rank of a 288x32 matrix"):
        run(source, "rank=33 basis=plain")
    with pytest.raises(UsageError, match="above the full rank of a 48x32 matrix"):
        run(source, "rank=4 own-rank=33 basis=plain")
    with pytest.raises(UsageError, match="too few for factors"):
        run(source, "ratio=0.02 basis=plain")
    with pytest.raises(UsageError, match="calibrate"):
        moec.run_passes(Module(copy_of(source).op, source.weights, source.source), "latent-factorize{rank=4}")


def test_unlike_widths_share_only_the_side_of_the_model(source: Module) -> None:
    module = copy_of(source)
    layer = find_moe_layers(module.op)[0]
    expert = load_expert(layer, module.weights, 0)
    assert isinstance(expert, FeedForward) and expert.gate is not None
    gate, up = (Projection(Dense(item.dense()[:9])) for item in (expert.gate, expert.up))
    narrow = replace(expert, gate=gate, up=up, down=Projection(Dense(expert.down.dense()[:, :9].contiguous())))
    replace_experts(layer, module.weights, {0: narrow})
    changed, _ = run(module, "rank=4 sides=gate,up,down")
    assert [each.width for each in experts_of(changed)] == [9, *[WIDTH] * (EXPERTS - 1)]
    with pytest.raises(UsageError, match="different widths cannot share this factor"):
        run(module, "rank=4 sides=down share=right")
