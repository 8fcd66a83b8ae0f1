"""The routing kernel, in Triton's interpreter or on a GPU, against the reference executor: every stage that it has."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum
from pathlib import Path

import pytest
import torch

from moec.codegen.triton.emit import emit_triton
from moec.codegen.triton.rendering import PACKAGE_NAME, ROUTE_OPERANDS
from moec.codegen.triton.running import LayerRows, run_layers
from moec.codegen.triton.spec import Element
from moec.dialects.moe import (
    BiasUnit,
    ChoiceOn,
    GroupFill,
    GroupScore,
    Normalize,
    NormOver,
    RouteOp,
    Routing,
    Score,
    Select,
    WeightFrom,
)
from moec.errors import UnsupportedModelError
from moec.experts import find_moe_layers, run_layer
from moec.module import Module
from tests.codegen.triton_layers import PLACES, Case, Outcome, build, rows_of
from tests.ir.expert_bodies import dense

HIDDEN, EXPERTS, TOKENS = 16, 12, 19
BIAS = torch.linspace(-1.0, 1.0, EXPERTS)[torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(1))]
MASK = torch.tensor([True] * 4 + [False] + [True] * 5 + [False] * 2)

ROUTINGS: dict[str, tuple[Routing, dict[str, torch.Tensor]]] = {
    "softmax": (Routing(k=3), {}),
    "renormalised": (Routing(k=3, normalize=Normalize.SUM, norm_eps=1e-3), {}),
    "softmax of the selected logits": (
        Routing(k=2, choice_on=ChoiceOn.LOGIT, weight_from=WeightFrom.SOFTMAX_SELECTED, softcap=1.5),
        {"logit_bias": BIAS},
    ),
    "sigmoid, bias, groups by their two best": (
        Routing(
            score=Score.SIGMOID, groups=4, topk_groups=2, group_score=GroupScore.SUM_TOP2, k=4, scale=2.5,
            group_fill=GroupFill.ZERO, normalize=Normalize.SUM, norm_min=1e-6,
        ),
        {"select_bias": BIAS},
    ),
    "groups by their best, masked": (
        Routing(groups=3, topk_groups=2, k=3, temperature=0.6), {"mask": MASK, "per_expert_scale": BIAS},
    ),
    "some of every group": (Routing(groups=3, select=Select.PER_GROUP_TOPK, k=6, weight_from=WeightFrom.ONE), {}),
    "top-p": (Routing(select=Select.TOPP, p=0.4, k_min=2, k_max=5), {"mask": MASK}),
    "top-p without the crossing one": (Routing(select=Select.TOPP, p=0.6, take_crossing=False), {}),
    "entropy": (Routing(select=Select.ENTROPY, p=0.5, entropy_threshold=2.3), {}),
    "Tsallis entropy": (Routing(select=Select.ENTROPY, p=0.5, entropy_q=1.2, entropy_threshold=1.7), {}),
    "threshold": (Routing(select=Select.THRESHOLD, score=Score.SIGMOID, p=0.6), {}),
    "all": (Routing(select=Select.ALL, score=Score.RELU), {}),
    "skipping what is weak": (Routing(k=4, skip_ratio=0.6), {}),
    "from the second rank on": (Routing(k=3, rank_offset=1, score=Score.SQRT_SOFTPLUS), {}),
    "gates of their own": (
        Routing(k=3, score=Score.IDENTITY, weight_from=WeightFrom.SIGMOID_LOGIT, offset=1.0), {"logit_bias": BIAS},
    ),
    "null experts": (
        Routing(k=4, null_experts=3, normalize=Normalize.SUM, norm_over=NormOver.TRUE), {"select_bias": BIAS},
    ),
    "bias in standard deviations": (Routing(k=3, bias_unit=BiasUnit.STD), {"logit_bias": BIAS}),
    "bias above the maximum": (Routing(k=3, bias_unit=BiasUnit.MAX), {"logit_bias": BIAS.clamp_min(-0.5)}),
    "sparsemixer": (Routing(k=2, select=Select.SPARSEMIXER, jitter_eps=0.1), {}),
}  # fmt: skip


def _case(name: str) -> Case:
    routing, operands = ROUTINGS[name]
    experts = tuple(range(EXPERTS - routing.null_experts))
    stored = (*experts, *([-1] * routing.null_experts))
    return Case(name, [(dense(HIDDEN, 16), experts)], stored, routing, operands)


@pytest.fixture(scope="module")
def module() -> Module:
    return build([_case(name) for name in ROUTINGS], HIDDEN)


def _rows(count: int = TOKENS) -> torch.Tensor:
    rows = rows_of(count, HIDDEN) * 1.5
    # equal logits: the lower index is chosen
    rows[0] = 0.0
    return rows


@pytest.fixture(scope="module", params=PLACES)
def found(
    request: pytest.FixtureRequest, module: Module, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("routes")
    emit_triton(module, folder, element=Element.FLOAT32)
    requests = [LayerRows(folder / PACKAGE_NAME, number, _rows(), only_router=True) for number in range(len(ROUTINGS))]
    layers = find_moe_layers(module.op)
    runs = [run_layer(layer, module.weights, _rows().double(), _rows().double(), torch.float64) for layer in layers]
    return {
        name: Outcome(*pair) for name, *pair in zip(ROUTINGS, run_layers(requests, request.param), runs, strict=True)
    }


def _by_expert(ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(ids), EXPERTS, dtype=torch.float64).scatter_add(1, ids, gates.double())


@pytest.mark.xdist_group("triton routes")
@pytest.mark.parametrize("name", list(ROUTINGS))
def test_equals_the_reference(name: str, found: dict[str, Outcome]) -> None:
    got, expected = found[name].found, found[name].expected
    if not ROUTINGS[name][0].null_experts:
        # null experts leave their slots empty where they are, the reference moves them to the end
        assert torch.equal(got.ids, expected.ids)
    torch.testing.assert_close(
        _by_expert(got.ids, got.gates), _by_expert(expected.ids, expected.gates), rtol=1e-5, atol=1e-6
    )


def test_every_choice_of_every_stage_is_run() -> None:
    for stage in fields(Routing):
        default = getattr(Routing(), stage.name)
        used = {getattr(routing, stage.name) for routing, _ in ROUTINGS.values()}
        if isinstance(default, Enum):
            assert used == set(type(default)) - {Select.FORCED}, stage.name
        else:
            assert used != {default}, stage.name
    assert {name for _, operands in ROUTINGS.values() for name in operands} == set(ROUTE_OPERANDS)


def test_refuses_choices_that_the_model_gives(tmp_path: Path) -> None:
    module = build([Case("forced", routing=Routing(k=2))])
    layer = find_moe_layers(module.op)[0]
    given = [None, None, None, None, None, layer.route.ids, None]
    forced = RouteOp(layer.route.logits, *given, routing=Routing(select=Select.FORCED))
    forced.insert_before(layer.experts)
    layer.experts.set_operand(1, forced.ids)
    layer.experts.set_operand(2, forced.gates)
    with pytest.raises(UnsupportedModelError, match=r"the model gives the choices itself.*set-routing"):
        emit_triton(module, tmp_path, element=Element.FLOAT32)


def test_refuses_a_bias_that_depends_on_the_token(tmp_path: Path) -> None:
    module = build([Case("computed", routing=Routing(k=2), operands={"logit_bias": torch.zeros(4)})])
    layer = find_moe_layers(module.op)[0]
    layer.route.set_operand(1, layer.route.logits)
    with pytest.raises(UnsupportedModelError, match="its logit bias is computed"):
        emit_triton(module, tmp_path, element=Element.FLOAT32)
