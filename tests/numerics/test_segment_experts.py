"""factorize{target=experts}: finer experts, chosen and weighed as the experts that they are parts of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import moec
from moec.dialects.moe import Select
from moec.errors import UsageError
from moec.experts import FeedForward, find_moe_layers, load_expert
from moec.experts.segment import finer_routing, segmenting_problem
from moec.module import Module
from moec.reference.route import RouteInputs, route
from tests.experts.models import calibrate_text, copy_of, difference, output, raised_model
from tests.numerics.test_route import EXPERTS, TOKENS, make_inputs, routings

EXACT = 1e-9
PER_EXPERT = ("logits", "logit_bias", "mask", "select_bias", "per_expert_scale")


@settings(max_examples=300, deadline=None)
@given(
    routings(),
    st.integers(0, 10**6),
    st.frozensets(st.sampled_from(["logit_bias", "mask", "select_bias", "per_expert_scale"])),
    st.integers(2, 3),
)
def test_all_parts_of_the_same_experts_are_chosen(routing, seed, operands, parts) -> None:  # type: ignore[no-untyped-def]
    inputs = make_inputs(routing, seed, operands)
    assume(not segmenting_problem(_Route(inputs, routing)))  # type: ignore[arg-type]
    finer = finer_routing(routing, parts)
    assert finer.problem(EXPERTS * parts) is None
    ids, gates, _ = route(inputs, routing)
    repeated = {
        name: None if (value := getattr(inputs, name)) is None else value.repeat_interleave(parts, dim=-1)
        for name in PER_EXPERT
    }
    finer_ids, finer_gates, _ = route(replace(inputs, **repeated), finer)
    for part in range(parts):
        mine = torch.where(finer_ids % parts == part, finer_gates, 0.0)
        assert torch.allclose(_by_expert(finer_ids // parts, mine), _by_expert(ids, gates), rtol=1e-9, atol=1e-12)


class _Route:
    """A route operation's operands as far as `segmenting_problem` looks."""

    def __init__(self, inputs: RouteInputs, routing: object) -> None:
        self.routing = routing
        self.logit_bias, self.select_bias = inputs.logit_bias, inputs.select_bias
        self.score_override, self.forced_ids = inputs.score_override, inputs.forced_ids


def _by_expert(ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    return torch.zeros(TOKENS, EXPERTS, dtype=torch.float64).scatter_add_(1, ids, gates)


@pytest.fixture(scope="module", params=["mixtral", "olmoe", "gpt_oss", "qwen2_moe"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Module:
    return raised_model(request.param, tmp_path_factory.mktemp(request.param))


def changed(module: Module, pipeline: str) -> Module:
    module = copy_of(module)
    moec.run_passes(module, pipeline)
    return module


@pytest.mark.parametrize("options", ["experts=2", "experts=3 uneven=pad partition=contiguous"])
def test_finer_experts_compute_what_the_model_did(source: Module, options: str) -> None:
    parts = int(options[8])
    before = find_moe_layers(source.op)
    module = changed(source, f"factorize{{target=experts {options}}}")
    after = find_moe_layers(module.op)
    assert [layer.top_k for layer in after] == [layer.top_k * parts for layer in before]
    assert [layer.expert_count for layer in after] == [layer.expert_count * parts for layer in before]
    assert difference(output(source), output(module)) < EXACT
    # one class of experts: all are of one kind
    assert {len(layer.experts.classes) for layer in after} == {1}


def test_experts_of_a_factorised_block_become_finer(tmp_path: Path) -> None:
    dense = raised_model("llama", tmp_path)
    text = calibrate_text(tmp_path, rows=20, length=32)
    module = changed(
        dense, f"{text},factorize{{experts=3}},factorize{{target=experts experts=4 partition=co-activation}}"
    )
    layer = find_moe_layers(module.op)[0]
    assert (layer.expert_count, layer.top_k, layer.route.routing.scale) == (12, 12, 1.0)
    experts = [load_expert(layer, module.weights, number) for number in range(12)]
    assert [expert.width for expert in experts if isinstance(expert, FeedForward)] == [8] * 12
    assert difference(output(dense), output(module)) < EXACT


@pytest.mark.parametrize("select", [Select.TOPP, Select.ENTROPY])
def test_routers_that_could_take_a_part_alone_are_refused(source: Module, select: Select) -> None:
    module = copy_of(source)
    layer = find_moe_layers(module.op)[0]
    layer.route.routing = replace(layer.route.routing, select=select)
    assert f"selects by {select.value}" in segmenting_problem(layer.route)


def test_bad_input_is_refused(source: Module) -> None:
    with pytest.raises(UsageError, match="expert 0"):
        changed(source, "factorize{target=experts experts=7}")
    with pytest.raises(UsageError, match="target=experts takes a partition, without shared neurons"):
        changed(source, "factorize{target=experts experts=2 shared=8}")
