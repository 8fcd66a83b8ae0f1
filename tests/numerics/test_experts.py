"""`moe.experts`: its two lowerings, aliases, null experts, several classes, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.dialects.builtin import FuncOp, ModuleOp, WeightOp
from moec.dialects.moe import ExpertClass, ExpertsOp
from moec.ir import DType, TensorType, Value, symbol, verify
from moec.reference.executor import Executor
from moec.reference.frame import ExpertsLowering
from moec.weights.context import WeightContext
from moec.weights.expression import Expression
from tests.ir.build import f32, moe_module, swiglu_body
from tests.ir.expert_bodies import Kind, affine, constant, dense, latent, low_rank, mixed_layer
from tests.ir.expert_bodies import by_hand as by_hand_mixed

HIDDEN, WIDE, NARROW = 6, 5, 3
COUNT = symbol("count")


def layer(stored: tuple[int, ...], slots: int = 3) -> ModuleOp:
    """Stored experts 0, 2 and 4 are wide, 1 and 3 are narrow; `stored` maps router outputs to them."""
    ids_type = TensorType((COUNT, slots), DType.I64)
    function = FuncOp.build("main", [f32(COUNT, HIDDEN), ids_type, f32(COUNT, slots)], arg_names=["x", "ids", "gates"])

    def weight(name: str, *shape: int) -> Value:
        op = WeightOp(result_types=[f32(*shape)], weight_name=name, source=name)
        function.body.append(op)
        return op.value

    stacks = []
    for name, count, width in (("wide", 3, WIDE), ("narrow", 2, NARROW)):
        stacks.append(weight(f"{name}.gate_up", count, 2 * width, HIDDEN))
        stacks.append(weight(f"{name}.down", count, HIDDEN, width))
    experts = ExpertsOp(
        *function.arguments,
        stacks,
        regions=[swiglu_body(HIDDEN, WIDE), swiglu_body(HIDDEN, NARROW)],
        stored=stored,
        classes=(ExpertClass((0, 2, 4), 2), ExpertClass((1, 3), 2)),
    )
    function.body.append(experts)
    function.finish([experts.y], ["y"])
    module = ModuleOp.build([function])
    verify(module)
    return module


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "wide.gate_up": (3, 2 * WIDE, HIDDEN),
        "wide.down": (3, HIDDEN, WIDE),
        "narrow.gate_up": (2, 2 * NARROW, HIDDEN),
        "narrow.down": (2, HIDDEN, NARROW),
    }
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


PLACE = {0: ("wide", 0), 2: ("wide", 1), 4: ("wide", 2), 1: ("narrow", 0), 3: ("narrow", 1)}


def by_hand(
    given: dict[str, torch.Tensor], x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, stored: tuple[int, ...]
) -> torch.Tensor:
    """Token by token, slot by slot."""
    y = torch.zeros_like(x)
    for token in range(len(x)):
        for slot in range(ids.shape[1]):
            target = stored[int(ids[token, slot])]
            if target >= 0:
                name, row = PLACE[target]
                gate, up = (given[f"{name}.gate_up"][row] @ x[token]).chunk(2)
                out = given[f"{name}.down"][row] @ (torch.nn.functional.silu(gate) * up)
                y[token] += gates[token, slot] * out
    return y


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 9), st.lists(st.integers(-1, 4), min_size=2, max_size=8))
def test_both_lowerings_equal_slot_by_slot(seed: int, tokens: int, stored: list[int]) -> None:
    """Aliases add their gates, -1 gives nothing, a slot with gate 0 is empty, no token at all is allowed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, len(stored), (tokens, 3), generator=generator)
    gates = torch.rand(tokens, 3, generator=generator, dtype=torch.float64)
    gates[torch.rand(tokens, 3, generator=generator) < 0.3] = 0.0
    expected = by_hand(weights(seed), x, ids, gates, tuple(stored))
    module = layer(tuple(stored))
    for lowering in ExpertsLowering:
        executor = Executor(module, weights(seed), dtype=torch.float64, experts=lowering)
        y = executor.run({"x": x, "ids": ids, "gates": gates})["y"]
        assert torch.allclose(y, expected, rtol=1e-9, atol=1e-9)
        assert y.shape == x.shape


def test_expert_without_tokens_is_never_loaded() -> None:
    module = layer((0, 1, 2, 3, 4))
    given = weights()
    given["wide.gate_up"][2] = torch.nan
    given["narrow.down"][0] = torch.nan
    ids = torch.tensor([[0, 2, 3]])
    y = Executor(module, given).run({"x": torch.randn(1, HIDDEN), "ids": ids, "gates": torch.ones(1, 3)})["y"]
    assert bool(y.isfinite().all())


@pytest.mark.parametrize("lowering", ExpertsLowering)
def test_gradients_of_a_whole_layer(lowering: ExpertsLowering) -> None:
    """gradcheck on router, stacked experts and input together, weights given as overrides."""
    torch.manual_seed(0)
    executor = Executor(layer((0, 1, 2, 3, 4)), weights(), dtype=torch.float64, experts=lowering)
    ids = torch.tensor([[0, 1, 2], [3, 4, 0], [1, 1, 2]])
    names = ["wide.gate_up", "wide.down", "narrow.gate_up", "narrow.down"]

    def run(x: torch.Tensor, gates: torch.Tensor, *stacks: torch.Tensor) -> torch.Tensor:
        overrides = dict(zip(names, stacks, strict=True))
        return executor.run({"x": x, "ids": ids, "gates": gates}, overrides=overrides)["y"]

    leaves = [torch.randn(3, HIDDEN, dtype=torch.float64), torch.rand(3, 3, dtype=torch.float64) + 0.1]
    leaves += [weights()[name] for name in names]
    assert torch.autograd.gradcheck(run, [leaf.requires_grad_() for leaf in leaves])


def test_gradients_flow_through_the_router() -> None:
    executor = Executor(moe_module(), _moe_weights(), dtype=torch.float64)
    router = _moe_weights()["router.weight"].double().requires_grad_()
    y = executor.run({"x": torch.randn(5, 64)}, overrides={"router": router})["y"]
    (gradient,) = torch.autograd.grad(y.square().sum(), router)
    assert float(gradient.abs().max()) > 0


def _moe_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    given = {"router.weight": torch.randn(8, 64, generator=generator)}
    for expert in range(8):
        given[f"experts.{expert}.gate_up"] = torch.randn(96, 64, generator=generator) / 8
        given[f"experts.{expert}.down"] = torch.randn(64, 48, generator=generator) / 7
    return given


MIXED_HIDDEN = 6


def _mixed() -> list[tuple[Kind, tuple[int, ...]]]:
    """Every kind of expert in one layer."""
    return [
        (dense(MIXED_HIDDEN, 5, bias=True), (0, 8)),
        (low_rank(MIXED_HIDDEN, 5, 2), (1, 4)),
        (low_rank(MIXED_HIDDEN, 4, 2, base=True, name="difference"), (2, 7, 9)),
        (latent(MIXED_HIDDEN, 5, 3), (5, 10)),
        (constant(MIXED_HIDDEN), (3, 11)),
        (affine(MIXED_HIDDEN, 2), (6,)),
    ]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 9), st.lists(st.integers(-1, 11), min_size=2, max_size=14))
def test_kinds_of_experts_with_shared_weights(seed: int, tokens: int, stored: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = mixed_layer(_mixed(), tuple(stored), hidden=MIXED_HIDDEN, slots=3, seed=seed)
    given = {name: tensor.double() for name, tensor in found.weights.items()}
    x = torch.randn(tokens, MIXED_HIDDEN, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, len(stored), (tokens, 3), generator=generator)
    gates = torch.rand(tokens, 3, generator=generator, dtype=torch.float64)
    gates[torch.rand(tokens, 3, generator=generator) < 0.3] = 0.0
    expected = by_hand_mixed(_mixed(), tuple(stored), given, x, ids, gates)
    for lowering in ExpertsLowering:
        executor = Executor(found.op, given, dtype=torch.float64, experts=lowering)
        y = executor.run({"x": x, "ids": ids, "gates": gates})["y"]
        assert torch.allclose(y, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lowering", ExpertsLowering)
def test_gradients_of_shared_weights(lowering: ExpertsLowering) -> None:
    found = mixed_layer(_mixed(), tuple(range(12)), hidden=MIXED_HIDDEN, slots=3)
    given = {name: tensor.double() for name, tensor in found.weights.items()}
    executor = Executor(found.op, given, dtype=torch.float64, experts=lowering)
    x = torch.randn(4, MIXED_HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(12).reshape(4, 3)
    names = ["difference.gate_base", "difference.down_base", "latent.up_right", "latent.down_left"]

    def run(*weights: torch.Tensor) -> torch.Tensor:
        feeds = {"x": x, "ids": ids, "gates": torch.ones(4, 3, dtype=torch.float64)}
        return executor.run(feeds, overrides=dict(zip(names, weights, strict=True)))["y"]

    assert torch.autograd.gradcheck(run, [given[name].requires_grad_() for name in names])


def test_shared_weight_is_loaded_once() -> None:
    """However many experts read it, and not at all where no token goes to its class."""
    found = mixed_layer(_mixed(), tuple(range(12)), hidden=MIXED_HIDDEN, slots=3)
    loaded: list[str] = []

    class Counting(WeightContext):
        def load(self, source: str | Expression, index: int | slice | None = None) -> torch.Tensor:
            loaded.append(str(source))
            return super().load(source, index)

    executor = Executor(found.op, Counting(in_memory=found.weights))
    gates = torch.ones(1, 3)
    executor.run({"x": torch.randn(1, MIXED_HIDDEN), "ids": torch.tensor([[2, 7, 9]]), "gates": gates})
    assert loaded.count("difference.gate_base") == 1 and loaded.count("difference.gate_left") == 3
    assert not any(name.startswith("latent") for name in loaded)
