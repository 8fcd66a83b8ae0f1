"""group-route on tiny models: exact counts on every token, gates of the chosen, and what is lost."""

from __future__ import annotations

import re

import pytest
import torch

import moec
from moec.dialects.moe import Select
from moec.errors import UsageError
from moec.experts import MoeLayer, find_moe_layers, run_layer, slice_experts
from moec.module import Module
from moec.pipeline.manager import PassManager, Pipeline, PipelineReport
from moec.pipeline.spec import PipelineError
from tests.experts.models import calibrate_text, copy_of, difference, output, raised_model


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Module:
    folder = tmp_path_factory.mktemp(request.param)
    module = raised_model(request.param, folder, num_experts_per_tok=4)
    moec.run_passes(module, calibrate_text(folder, rows=16))
    return module


def layers_of(module: Module) -> tuple[MoeLayer, ...]:
    return find_moe_layers(module.op)


def grouped(source: Module, groups: int) -> tuple[Module, PipelineReport]:
    module = copy_of(source)
    pipeline = Pipeline.parse(f"group-route{{groups={groups}}}")
    return module, PassManager(pipeline).run(module.op, weights=module.weights, module=module)


@pytest.mark.parametrize("groups", [2, 4])
def test_every_token_chooses_equally_many_of_each_group(source: Module, groups: int) -> None:
    module, _ = grouped(source, groups)
    assert output(module).isfinite().all()
    for layer in layers_of(module):
        rows = torch.randn(300, layer.hidden_size)
        run = run_layer(layer, module.weights, rows, rows)
        size = layer.outputs // groups
        counts = torch.nn.functional.one_hot(run.ids // size, groups).sum(1)
        assert bool((counts == 4 // groups).all()) and bool((run.gates > 0).all())


def test_tokens_whose_choice_was_balanced_keep_it(source: Module) -> None:
    module, _ = grouped(source, 2)
    before, after = layers_of(source)[0], layers_of(module)[0]
    rows = torch.randn(400, before.hidden_size)
    old, new = (run_layer(layer, source.weights, rows, rows, torch.float64) for layer in (before, after))
    # where an expert went, by its row in the router
    weights = [source.weights.load(str(layer.router.tensor("weight").defining_op.source)) for layer in (before, after)]  # type: ignore[union-attr]
    place = torch.tensor([int((weights[1] == row).all(1).nonzero()[0, 0]) for row in weights[0]])
    ids = place[old.ids]
    balanced = ((ids < after.outputs // 2).sum(1) == 2).nonzero()[:, 0]
    assert 20 < len(balanced) < 400
    assert old.y is not None and new.y is not None
    assert difference(old.y[balanced], new.y[balanced]) < 1e-9


def test_less_is_lost_than_by_random_groups(source: Module) -> None:
    _, report = grouped(source, 2)
    found = re.findall(
        r"tokens lose ([\d.]+)% of their gate mass, with random groups ([\d.]+)%", report.explanation_text()
    )
    assert len(found) == report.records[0].statistics["grouped"] == 2
    assert all(0 < float(lost) < float(random) for lost, random in found)


def test_one_group_is_the_identity(source: Module) -> None:
    module, _ = grouped(source, 1)
    assert module.print() == source.print()


def test_groups_that_do_not_divide_are_refused_with_those_that_do(source: Module) -> None:
    with pytest.raises(UsageError, match=r"3 groups do not divide 8 experts.*groups that fit are 2, 4"):
        grouped(source, 3)
    with pytest.raises(UsageError, match=r"8 groups do not divide 4 choices per token"):
        grouped(source, 8)
    odd = copy_of(source)
    slice_experts(layers_of(odd)[1], range(7))
    with pytest.raises(UsageError, match="no number of groups fits"):
        grouped(odd, 2)


def test_a_router_with_groups_stays(source: Module) -> None:
    once, _ = grouped(source, 2)
    text = once.print()
    again, report = grouped(once, 4)
    assert again.print() == text
    assert "selects by per_group_topk" in report.explanation_text()
    assert all(layer.route.routing.select is Select.PER_GROUP_TOPK for layer in layers_of(once))


def test_groups_below_one_cannot_be(source: Module) -> None:
    with pytest.raises(PipelineError, match="groups must be at least 1"):
        grouped(source, 0)
