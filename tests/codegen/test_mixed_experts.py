"""Layers whose experts differ: widths, kinds, shared weights, constants, aliases, null experts, as ONNX."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch

from moec.codegen.onnx import merged_slots
from moec.codegen.onnx.cost_model import Lowering
from moec.codegen.onnx.expert_rows import experts_shape
from moec.codegen.onnx.targets import Target
from moec.dialects.moe import Routing, Score, Select
from moec.ir import DType
from moec.reference.executor import Executor
from moec.reference.frame import ExpertsLowering
from tests.codegen.running import assert_close, emit_and_run, load, module_of, operators, reference, run
from tests.ir.expert_bodies import (
    Kind,
    MixedLayer,
    affine,
    constant,
    dense,
    latent,
    low_rank,
    mixed_layer,
)

HIDDEN = 12
Kinds = list[tuple[Kind, tuple[int, ...]]]

LAYERS: dict[str, tuple[Kinds, tuple[int, ...]]] = {
    "equal": ([(dense(HIDDEN, 8), (0, 1, 2, 3))], (0, 1, 2, 3)),
    "ragged widths": (
        [(dense(HIDDEN, 8, name="wide"), (0, 3)), (dense(HIDDEN, 5, name="narrow"), (1, 2, 4))],
        (0, 1, 2, 3, 4),
    ),
    "every width another": (
        [(dense(HIDDEN, 3 + index, name=f"width_{index}"), (index,)) for index in range(5)],
        (0, 1, 2, 3, 4),
    ),
    "biases": (
        [(dense(HIDDEN, 8, bias=True), (0, 1, 2)), (dense(HIDDEN, 4, bias=True, name="narrow"), (3,))],
        (0, 1, 2, 3),
    ),
    "low rank": ([(low_rank(HIDDEN, 8, 3), (0, 1, 2, 3))], (0, 1, 2, 3)),
    "low rank beside dense": ([(dense(HIDDEN, 8), (1, 2)), (low_rank(HIDDEN, 8, 3), (0, 3))], (0, 1, 2, 3)),
    "differences to a base": ([(low_rank(HIDDEN, 8, 2, base=True), (0, 1, 2, 3))], (0, 1, 2, 3)),
    "differences to a base, of few experts": (
        [(dense(HIDDEN, 8), (0, 1, 2, 3)), (low_rank(HIDDEN, 8, 2, base=True), (4, 5))],
        (0, 1, 2, 3, 4, 5),
    ),
    "latent": ([(latent(HIDDEN, 8, 5), (0, 1, 2, 3))], (0, 1, 2, 3)),
    "latent, of few experts": (
        [(dense(HIDDEN, 8), (0, 1, 2, 3)), (latent(HIDDEN, 8, 5), (4, 5))],
        (0, 1, 2, 3, 4, 5),
    ),
    "constants": ([(dense(HIDDEN, 8), (0, 1)), (constant(HIDDEN), (2, 3, 4))], (0, 1, 2, 3, 4)),
    "one constant": ([(dense(HIDDEN, 8), (0, 1, 2)), (constant(HIDDEN), (3,))], (0, 1, 2, 3)),
    "only constants": ([(constant(HIDDEN), (0, 1, 2))], (0, 1, 2)),
    "affine": ([(dense(HIDDEN, 8), (0, 3)), (affine(HIDDEN, 2), (1, 2))], (0, 1, 2, 3)),
    "aliases": ([(dense(HIDDEN, 8), (0, 1, 2))], (0, 1, 1, 2, 0, 1)),
    "null experts": ([(dense(HIDDEN, 8), (0, 1)), (constant(HIDDEN), (2,))], (0, -1, 1, 2, -1)),
    "nothing but null experts": ([], (-1, -1, -1)),
    "everything": (
        [
            (dense(HIDDEN, 8, bias=True), (0, 8)),
            (low_rank(HIDDEN, 7, 2), (1, 4)),
            (low_rank(HIDDEN, 4, 2, base=True, name="difference"), (2, 7, 9)),
            (latent(HIDDEN, 5, 3), (5, 10)),
            (constant(HIDDEN), (3, 11)),
            (affine(HIDDEN, 2), (6,)),
        ],
        (0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10, 11, -1, 3),
    ),
}
ROUTINGS = {
    "softmax": Routing(k=2),
    "sigmoid, three slots": Routing(k=3, score=Score.SIGMOID, scale=2.0),
    "top-p": Routing(select=Select.TOPP, p=0.6, k_max=3),
}


def build(name: str, routing: Routing, seed: int = 0) -> MixedLayer:
    kinds, stored = LAYERS[name]
    return mixed_layer(kinds, stored, hidden=HIDDEN, routing=routing, seed=seed)


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_on_every_target(name: str, routing: str, tmp_path: Path) -> None:
    """Against both lowerings of the reference executor; the cost model chooses the form."""
    made = build(name, ROUTINGS[routing])
    module = module_of(made.op, made.weights)
    sessions, forms = {}, {}
    for target in Target:
        report = emit_and_run(module, {"x": tokens(1)}, tmp_path / target.value, target=target)[1]
        sessions[target], forms[target] = load(tmp_path / target.value), report.layers[0].choice.lowering
    for count in (0, 1, 2, 19):
        feeds = {"x": tokens(count, seed=count)}
        expected = reference(module, feeds)["y"]
        oracle = Executor(module.op, module.weights, dtype=torch.float64, experts=ExpertsLowering.ORACLE)
        assert_close(oracle.run({"x": feeds["x"].double()})["y"].detach().numpy(), expected, 1e-12)
        for target, session in sessions.items():
            # the kernel of the fused operator fails without tokens, which no model runs
            if count or forms[target] is not Lowering.FUSED:
                assert_close(run(session, feeds)["y"], expected)


@pytest.mark.parametrize("name", LAYERS)
def test_lean_function(name: str, tmp_path: Path) -> None:
    made = build(name, Routing(k=2))
    module, feeds = module_of(made.op, made.weights), {"x": tokens(11)}
    found, report = emit_and_run(module, feeds, tmp_path, target=Target.ORT_CPU, lowering=Lowering.LEAN_FUNCTION)
    assert report.layers[0].nodes == 1
    assert_close(found["y"], reference(module, feeds)["y"])


@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize("name", LAYERS)
def test_float16(name: str, target: Target, tmp_path: Path) -> None:
    """With weights that float16 holds exactly, so that nothing but the arithmetic is compared."""
    made = build(name, Routing(k=2))
    weights = {name: tensor.half().float() for name, tensor in made.weights.items()}
    module, feeds = module_of(made.op, weights), {"x": tokens(11)}
    found, _ = emit_and_run(module, feeds, tmp_path, target=target, dtype=DType.F16)
    assert_close(found["y"], reference(module, feeds)["y"])


FUSED = ("equal", "aliases")  # a tuple: the workers must collect the tests in one order
REASONS = {
    "ragged widths": "2 classes of experts",
    "low rank": "not two products",
    "differences to a base": "the experts share weights",
    "latent": "the experts share weights",
    "only constants": "not two products",
    "nothing but null experts": "0 classes of experts",
}


@pytest.mark.parametrize("name", [*FUSED, *REASONS])
def test_fused_operator_or_the_reason_why_not(name: str, tmp_path: Path) -> None:
    made = build(name, Routing(k=2))
    module, feeds = module_of(made.op, made.weights), {"x": tokens(11)}
    found, report = emit_and_run(module, feeds, tmp_path, target=Target.ORT_CPU, lowering=Lowering.FUSED)
    choice = report.layers[0].choice
    assert (choice.lowering is Lowering.FUSED) == (name in FUSED)
    assert name in FUSED or REASONS[name] in choice.reason
    assert_close(found["y"], reference(module, feeds)["y"])


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", ["aliases", "null experts", "everything", "more aliases"])
def test_slots_with_the_same_expert_become_one(
    name: str, routing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged_slots, "MERGED_SLOTS", 0.0)
    layers = {**LAYERS, "more aliases": ([(dense(HIDDEN, 8), (0, 1))], (0, 0, 0, 1, 1, -1, 0))}
    kinds, stored = layers[name]
    made = mixed_layer(kinds, stored, hidden=HIDDEN, routing=ROUTINGS[routing])
    module = module_of(made.op, made.weights)
    emit_and_run(module, {"x": tokens(1)}, tmp_path)
    session = load(tmp_path)
    for count in (1, 19):
        feeds = {"x": tokens(count, seed=count)}
        assert_close(run(session, feeds)["y"], reference(module, feeds)["y"])
    assert ("Equal" in operators(tmp_path)) == (name != "null experts" or routing == "top-p")


def test_merging_is_left_out_where_it_costs_more_than_it_saves() -> None:
    aliases = mixed_layer([(dense(512, 512), tuple(range(16)))], tuple(range(16)) * 2, hidden=512, routing=Routing(k=8))
    distinct = mixed_layer([(dense(512, 512), tuple(range(16)))], tuple(range(16)), hidden=512, routing=Routing(k=8))
    shape = experts_shape(aliases.experts)
    assert merged_slots.merging_pays(aliases.experts, shape, tokens=512)
    assert not merged_slots.merging_pays(aliases.experts, shape, tokens=1)
    assert not merged_slots.merging_pays(distinct.experts, shape, tokens=10**6)


@pytest.mark.parametrize("stored", [(0, 1, 2), (0, 0, 1), (0, 0, 1, 1, 2, -1), (0, 0, 0, 0), (-1, -1)])
@pytest.mark.parametrize("slots", [1, 2])
def test_repeated_share_is_the_mean_over_all_choices(stored: tuple[int, ...], slots: int) -> None:
    choices = [[stored[output] for output in chosen] for chosen in combinations(range(len(stored)), slots)]
    repeats = sum(sum(expert >= 0 for expert in found) - len(set(found) - {-1}) for found in choices)
    expected = repeats / len(choices) / slots
    assert merged_slots.repeated_share(stored, slots) == pytest.approx(expected, abs=1e-12)


def test_shared_weights_are_one_product_each(tmp_path: Path) -> None:
    """Two projections into the latent space and one back; the tokens themselves are not even gathered."""
    made = build("latent", Routing(k=2))
    report = emit_and_run(module_of(made.op, made.weights), {"x": tokens(3)}, tmp_path)[1]
    # 4 experts have three products each of their own, and the router is one more
    assert operators(tmp_path)["Gemm"] + operators(tmp_path)["MatMul"] == 3 + 3 * 4 + 1 + 1
    assert report.layers[0].nodes <= 3 * 4 + 40


EXPERTS = 24
NODES = {
    "dense": ([(dense(HIDDEN, 6), tuple(range(EXPERTS)))], 2, 1),
    "three widths": (
        [
            (dense(HIDDEN, 4 + index, name=f"width_{index}"), tuple(range(8 * index, 8 * index + 8)))
            for index in range(3)
        ],
        2,
        3,
    ),
    "low rank": ([(low_rank(HIDDEN, 6, 2), tuple(range(EXPERTS)))], 5, 1),
    "every width another": (
        [(dense(HIDDEN, 4 + index, name=f"width_{index}"), (index,)) for index in range(EXPERTS)],
        2,
        EXPERTS,
    ),
    "constants": (
        [(dense(HIDDEN, 6), tuple(range(12))), (constant(HIDDEN), tuple(range(12, EXPERTS)))],
        1,
        2,
    ),
}


@pytest.mark.parametrize("name", NODES)
def test_number_of_nodes(name: str, tmp_path: Path) -> None:
    """Products of experts, forty, and a few more for each further class."""
    kinds, products, classes = NODES[name]
    made = mixed_layer(kinds, tuple(range(EXPERTS)), hidden=HIDDEN, routing=Routing(k=2))
    report = emit_and_run(module_of(made.op, made.weights), {"x": tokens(3)}, tmp_path)[1]
    assert report.layers[0].nodes <= products * EXPERTS + 40 + 8 * (classes - 1)
