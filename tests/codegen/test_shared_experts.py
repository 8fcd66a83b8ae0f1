"""Shared experts inside the fused operator: exact where their form fits, left alone where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moec.artifact.options import OptimizeFor
from moec.codegen.onnx.cost_model import Lowering
from moec.codegen.onnx.targets import Target
from moec.dialects import aten
from moec.dialects.builtin import FuncOp, ModuleOp, WeightOp
from moec.dialects.moe import ExpertClass, ExpertsOp, RouteOp, Routing
from moec.dialects.nn import MLPOp
from moec.ir import Operation, Value, symbol
from moec.module import Module
from tests.codegen.running import assert_close, emit_and_run, module_of, reference
from tests.ir.build import f32, swiglu_body

COUNT = symbol("count")
HIDDEN, WIDTH, EXPERTS = 16, 12, 6


def _layer(shared_width: int, gate: str | None, *, shared_first: bool) -> Module:
    """experts(x) + gate * mlp(x); `gate` is the operation that makes it from a linear layer, None for 1."""
    function = FuncOp.build("main", [f32(COUNT, HIDDEN)], arg_names=["x"])
    x = function.arguments[0]
    generator = torch.Generator().manual_seed(4)
    tensors: dict[str, torch.Tensor] = {}

    def add(op: Operation) -> Value:
        function.body.append(op)
        return op.results[0]

    def weight(name: str, *shape: int) -> Value:
        tensors[name] = torch.randn(shape, generator=generator) * 0.5
        return add(WeightOp(result_types=[f32(*shape)], weight_name=name, source=name))

    def linear(rows: Value, name: str, width: int) -> Value:
        operands = {"input": rows, "weight": weight(name, width, HIDDEN)}
        return add(aten.build("linear.default", operands, (f32(COUNT, width),)))

    def shared() -> Value:
        weights = [weight("shared_up", 2 * shared_width, HIDDEN), weight("shared_down", HIDDEN, shared_width)]
        y = add(MLPOp(x, weights, regions=[swiglu_body(HIDDEN, shared_width)]))
        if gate is None:
            return y
        opened = add(aten.build(gate, {"self": linear(x, "shared_gate", 1)}, (f32(COUNT, 1),)))
        return add(aten.build("mul.Tensor", {"self": opened, "other": y}, (f32(COUNT, HIDDEN),)))

    y = shared() if shared_first else None
    stacks = [weight("up", EXPERTS, 2 * WIDTH, HIDDEN), weight("down", EXPERTS, HIDDEN, WIDTH)]
    route = RouteOp(linear(x, "router", EXPERTS), routing=Routing(k=2))
    function.body.append(route)
    everyone = tuple(range(EXPERTS))
    experts = ExpertsOp(
        x,
        route.ids,
        route.gates,
        stacks,
        regions=[swiglu_body(HIDDEN, WIDTH)],
        stored=everyone,
        classes=(ExpertClass(everyone, 2),),
    )
    function.body.append(experts)
    y = shared() if y is None else y
    total = add(aten.build("add.Tensor", {"self": experts.y, "other": y}, (f32(COUNT, HIDDEN),)))
    function.finish([total], ["y"])
    return module_of(ModuleOp.build([function]), tensors)


def _run(module: Module, folder: Path, optimize_for: OptimizeFor = OptimizeFor.DECODE) -> int:
    """Checks the result; how many experts stand for the shared one."""
    feeds = {"x": torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(6))}
    found, report = emit_and_run(
        module, feeds, folder, target=Target.ORT_CPU, lowering=Lowering.FUSED, optimize_for=optimize_for
    )
    assert_close(found["y"], reference(module, feeds)["y"])
    assert report.layers[0].choice.lowering is Lowering.FUSED
    return report.layers[0].shared


@pytest.mark.parametrize("shared_first", [True, False])
@pytest.mark.parametrize("gate", [None, "sigmoid.default"])
@pytest.mark.parametrize("parts", [1, 3])
def test_folded(parts: int, gate: str | None, shared_first: bool, tmp_path: Path) -> None:
    assert _run(_layer(parts * WIDTH, gate, shared_first=shared_first), tmp_path) == parts


def test_left_alone(tmp_path: Path) -> None:
    """Another width, a gate that may be negative, and long inputs, for which packed weights are faster."""
    assert _run(_layer(WIDTH + 4, None, shared_first=True), tmp_path / "width") == 0
    assert _run(_layer(WIDTH, "tanh.default", shared_first=True), tmp_path / "gate") == 0
    assert _run(_layer(WIDTH, None, shared_first=True), tmp_path / "prefill", OptimizeFor.PREFILL) == 0
