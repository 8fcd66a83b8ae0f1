"""The forms of `moe.experts` in ONNX: against the reference, against each other, and what the fused one refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from moec.artifact.options import OptimizeFor
from moec.codegen.onnx import parity
from moec.codegen.onnx.cost_model import Lowering
from moec.codegen.onnx.emit import MODEL_FILE
from moec.codegen.onnx.targets import Target
from moec.dialects import aten
from moec.dialects.builtin import FuncOp, ModuleOp, WeightOp
from moec.dialects.moe import ExpertClass, ExpertsOp, Normalize, RouteOp, Routing, Score, Select, YieldOp
from moec.dialects.nn import TOKENS
from moec.ir import Block, Region, Value, symbol
from moec.module import Module
from tests.benchmarks.expert_layers import LayerShape, moe_layers
from tests.codegen.running import assert_close, emit_and_run, load, module_of, reference, run
from tests.ir.build import f32
from tests.numerics.test_experts import layer, weights

COUNT = symbol("count")
HIDDEN, WIDTH, EXPERTS = 16, 12, 6
Between = Callable[[Block, Value], Value]


def _tokens(count: int, hidden: int = HIDDEN, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("stored", [(0, 1, 2, 3, 4), (2, 2, 0, 3, 1, 4, 4), (0, -1, 1, 2, -1, 3, 4)])
@pytest.mark.parametrize("tokens", [1, 9])
def test_classes_aliases_and_null_experts(stored: tuple[int, ...], tokens: int, tmp_path: Path) -> None:
    module = module_of(layer(stored), {name: value.float() for name, value in weights().items()})
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, len(stored), generator=generator).argsort(1)[:, :3]
    feeds = {"x": _tokens(tokens, 6), "ids": ids, "gates": torch.rand(tokens, 3, generator=generator)}
    found, _ = emit_and_run(module, feeds, tmp_path)
    assert_close(found["y"], reference(module, feeds)["y"])


@pytest.mark.parametrize("lowering", [form for form in Lowering if form is not Lowering.FUSED_PACKED])
@pytest.mark.parametrize(
    "routing",
    [
        Routing(k=2, normalize=Normalize.SUM),
        Routing(k=3, score=Score.SIGMOID, scale=2.5),
        Routing(select=Select.TOPP, p=0.5, k_max=4),
        Routing(k=2, null_experts=2),
    ],
    ids=["softmax", "sigmoid scaled", "top-p", "null experts"],
)
def test_every_lowering_with_routes(lowering: Lowering, routing: Routing, tmp_path: Path) -> None:
    module = moe_layers(LayerShape(EXPERTS, HIDDEN, WIDTH, 2, layers=2), routing=routing)
    if routing.null_experts:
        stored = (*range(EXPERTS - routing.null_experts), *[-1] * routing.null_experts)
        for op in module.main.body:
            if isinstance(op, ExpertsOp):
                op.stored = stored
    session = None
    for tokens in (1, 7, 33):
        feeds = {"x": _tokens(tokens)}
        if session is None:
            found, report = emit_and_run(module, feeds, tmp_path, target=Target.ORT_CPU, lowering=lowering)
            assert {layer.choice.lowering for layer in report.layers} == {lowering}
            session = load(tmp_path)
        else:
            found = run(session, feeds)
        assert_close(found["y"], reference(module, feeds)["y"])


def test_no_token_at_all(tmp_path: Path) -> None:
    for lowering in (Lowering.LEAN, Lowering.LEAN_FUNCTION):
        module = moe_layers(LayerShape(EXPERTS, HIDDEN, WIDTH, 2))
        found, _ = emit_and_run(
            module, {"x": _tokens(0)}, tmp_path / lowering.value, target=Target.ORT_CPU, lowering=lowering
        )
        assert found["y"].shape == (0, HIDDEN)


# What lies between the two products of an expert. Each gets the first product's result and appends operations.


def _op(block: Block, name: str, tensors: dict[str, Value], width: int, **arguments: object) -> Value:
    op = aten.build(name, tensors, (f32(TOKENS, width),), **arguments)
    block.append(op)
    return op.result


def _halves(block: Block, z: Value) -> tuple[Value, Value]:
    op = aten.build("chunk.default", {"self": z}, (f32(TOKENS, WIDTH),) * 2, chunks=2, dim=-1)
    block.append(op)
    return op.results[0], op.results[1]


def _pairs(block: Block, z: Value) -> tuple[Value, Value]:
    even, odd = (_op(block, "slice.Tensor", {"self": z}, WIDTH, dim=1, start=s, end=2 * WIDTH, step=2) for s in (0, 1))
    return even, odd


def _swiglu(block: Block, z: Value) -> Value:
    """silu spelled out, and the factors in the other order."""
    gate, up = _halves(block, z)
    sigmoid = _op(block, "sigmoid.default", {"self": gate}, WIDTH)
    return _op(
        block,
        "mul.Tensor",
        {"self": up, "other": _op(block, "mul.Tensor", {"self": sigmoid, "other": gate}, WIDTH)},
        WIDTH,
    )


def _gpt_oss(block: Block, z: Value) -> Value:
    gate, up = _pairs(block, z)
    gate = _op(block, "clamp.default", {"self": gate}, WIDTH, max=2.0)
    up = _op(block, "clamp.default", {"self": up}, WIDTH, min=-2.0, max=2.0)
    sharp = _op(block, "sigmoid.default", {"self": _op(block, "mul.Scalar", {"self": gate}, WIDTH, other=1.702)}, WIDTH)
    gate = _op(block, "mul.Tensor", {"self": gate, "other": sharp}, WIDTH)
    return _op(
        block, "mul.Tensor", {"self": _op(block, "add.Scalar", {"self": up}, WIDTH, other=1), "other": gate}, WIDTH
    )


def _geglu(block: Block, z: Value) -> Value:
    gate, up = _halves(block, z)
    gate = _op(block, "gelu.default", {"self": gate}, WIDTH, approximate="tanh")
    return _op(block, "mul.Tensor", {"self": gate, "other": up}, WIDTH)


def _one_sided(limit: float) -> Between:
    def clamped(block: Block, z: Value) -> Value:
        """A clamp of the gate alone, which the operator cannot express."""
        gate, up = _halves(block, z)
        gate = _op(block, "clamp.default", {"self": gate}, WIDTH, max=limit)
        silu = _op(block, "silu.default", {"self": gate}, WIDTH)
        return _op(block, "mul.Tensor", {"self": silu, "other": up}, WIDTH)

    return clamped


def _plain(name: str, **arguments: object) -> Between:
    return lambda block, z: _op(block, name, {"self": z}, WIDTH, **arguments)


def _squared_relu(block: Block, z: Value) -> Value:
    relu = _op(block, "relu.default", {"self": z}, WIDTH)
    return _op(block, "mul.Tensor", {"self": relu, "other": relu}, WIDTH)


def _layer(
    between: Callable[[Block, Value], Value], *, gated: bool, bias: bool, routing: Routing | None = None
) -> Module:
    """One routed layer whose experts have `between` their two products."""
    rows = 2 * WIDTH if gated else WIDTH
    shapes: dict[str, tuple[int, ...]] = {"up": (rows, HIDDEN), "down": (HIDDEN, WIDTH)}
    if bias:
        shapes.update(up_bias=(rows,), down_bias=(HIDDEN,))
    block = Block([f32(TOKENS, HIDDEN), *[f32(*shape) for shape in shapes.values()]])
    named = dict(zip(shapes, block.arguments[1:], strict=True))
    z = _product(block, block.arguments[0], named, "up", rows)
    y = _product(block, between(block, z), named, "down", HIDDEN)
    block.append(YieldOp([y], result_types=[]))
    function = FuncOp.build("main", [f32(COUNT, HIDDEN)], arg_names=["x"])
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}

    def weight(name: str, *shape: int) -> Value:
        tensors[name] = torch.randn(shape, generator=generator)
        op = WeightOp(result_types=[f32(*shape)], weight_name=name, source=name)
        function.body.append(op)
        return op.value

    router = weight("router", EXPERTS, HIDDEN)
    stacks = [weight(name, EXPERTS, *shape) for name, shape in shapes.items()]
    x = function.arguments[0]
    logits = aten.build("linear.default", {"input": x, "weight": router}, (f32(COUNT, EXPERTS),))
    route = RouteOp(logits.result, routing=routing or Routing(k=2))
    everyone = tuple(range(EXPERTS))
    classes = (ExpertClass(everyone, len(stacks)),)
    experts = ExpertsOp(x, route.ids, route.gates, stacks, regions=[Region(block)], stored=everyone, classes=classes)
    for op in (logits, route, experts):
        function.body.append(op)
    function.finish([experts.y], ["y"])
    return module_of(ModuleOp.build([function]), tensors)


def _product(block: Block, rows: Value, named: dict[str, Value], name: str, width: int) -> Value:
    tensors = {"input": rows, "weight": named[name]}
    if f"{name}_bias" in named:
        tensors["bias"] = named[f"{name}_bias"]
    return _op(block, "linear.default", tensors, width)


FUSED = {
    "swiglu": (_swiglu, True),
    "gpt-oss": (_gpt_oss, True),
    "relu": (_plain("relu.default"), False),
    "silu": (_plain("silu.default"), False),
    "tanh gelu": (_plain("gelu.default", approximate="tanh"), False),
}
REFUSED = {
    "geglu": (_geglu, True),
    "erf gelu": (_plain("gelu.default"), False),
    "squared relu": (_squared_relu, False),
    "clamped gate": (_one_sided(1.0), True),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_fused_activations(name: str, bias: bool, tmp_path: Path) -> None:
    between, gated = FUSED[name]
    module = _layer(between, gated=gated, bias=bias)
    feeds = {"x": _tokens(17)}
    found, report = emit_and_run(module, feeds, tmp_path, target=Target.ORT_CPU, lowering=Lowering.FUSED)
    assert report.layers[0].choice.lowering is Lowering.FUSED
    assert report.layers[0].parity is not None and report.layers[0].parity < parity.TOLERANCE
    assert_close(found["y"], reference(module, feeds)["y"])
    _check_fallback(tmp_path, feeds, found["y"])
    for target in Target:
        lean, _ = emit_and_run(module, feeds, tmp_path / target.value, target=target, lowering=Lowering.LEAN)
        assert_close(lean["y"], found["y"])


def _check_fallback(folder: Path, feeds: dict[str, torch.Tensor], expected: np.ndarray) -> None:
    """The function of the operator's name: by the reference evaluator, and inlined."""
    model = onnx.load(str(folder / MODEL_FILE))
    onnx.checker.check_model(str(folder / MODEL_FILE))
    given = {name: value.numpy() for name, value in feeds.items()}
    assert_close(ReferenceEvaluator(model).run(None, given)[0], expected)
    inlined = onnx.inliner.inline_local_functions(model)
    assert {node.domain for node in inlined.graph.node} == {""}
    onnx.save(inlined, str(folder / MODEL_FILE))
    assert_close(run(load(folder), feeds)["y"], expected)


@pytest.mark.parametrize("name", REFUSED)
def test_other_activations_stay_lean(name: str, tmp_path: Path) -> None:
    between, gated = REFUSED[name]
    module = _layer(between, gated=gated, bias=False)
    feeds = {"x": _tokens(17)}
    found, report = emit_and_run(module, feeds, tmp_path, target=Target.ORT_CPU, lowering=Lowering.FUSED)
    choice = report.layers[0].choice
    assert choice.lowering is Lowering.LEAN and "no such activation" in choice.reason
    assert_close(found["y"], reference(module, feeds)["y"])


@pytest.mark.parametrize("name", [*FUSED, *REFUSED])
def test_activations_expert_by_expert(name: str, tmp_path: Path) -> None:
    """As large layers have them; enough tokens make a small layer one."""
    between, gated = {**FUSED, **REFUSED}[name]
    module = _layer(between, gated=gated, bias=name == "gpt-oss")
    feeds = {"x": _tokens(17)}
    nodes = []
    for number, optimize_for in enumerate(OptimizeFor):
        folder = tmp_path / f"{number}"
        found, report = emit_and_run(
            module, feeds, folder, target=Target.ORT_CPU, lowering=Lowering.LEAN, optimize_for=optimize_for
        )
        assert_close(found["y"], reference(module, feeds)["y"])
        nodes.append(report.node_count)
    assert nodes[list(OptimizeFor).index(OptimizeFor.PREFILL)] >= min(nodes) + EXPERTS - 3


@pytest.mark.parametrize(
    "routing", [Routing(k=2, score=Score.IDENTITY), Routing(k=2, scale=-1.0)], ids=["raw logits", "negative scale"]
)
def test_gates_that_may_be_negative_stay_lean(routing: Routing, tmp_path: Path) -> None:
    module = _layer(_swiglu, gated=True, bias=False, routing=routing)
    feeds = {"x": _tokens(5)}
    found, report = emit_and_run(module, feeds, tmp_path, target=Target.ORT_CPU, lowering=Lowering.FUSED)
    assert report.layers[0].choice.lowering is Lowering.LEAN and "negative" in report.layers[0].choice.reason
    assert_close(found["y"], reference(module, feeds)["y"])


def test_parity_gate_sees_a_trap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body with another sigmoid than the kernel's: the gate must tell them apart."""
    signature = parity.NodeSignature(
        parity.FallbackForm(parity.Activation.SWIGLU, has_bias=False, has_limit=False),
        EXPERTS,
        (
            ("k", 2),
            ("activation_type", "swiglu"),
            ("normalize_routing_weights", 1),
            ("swiglu_fusion", 1),
            ("activation_alpha", 1.0),
            ("activation_beta", 0.0),
        ),
    )
    profile = Target.ORT_CPU.profile
    assert parity.check_parity(signature, profile).problem is None
    original = parity.fallback_function

    def wrong_body(opset: int, form: parity.FallbackForm) -> object:
        function = original(opset, form)
        for node in function:
            if node.op_type == "Loop":
                for inner in node.attributes["body"].as_graph():
                    if inner.op_type == "Sigmoid":
                        inner.op_type = "HardSigmoid"
        return function

    monkeypatch.setattr(parity, "fallback_function", wrong_body)
    parity.check_parity.cache_clear()
    found = parity.check_parity(signature, profile)
    parity.check_parity.cache_clear()
    assert found.problem is not None and "differ" in found.problem
