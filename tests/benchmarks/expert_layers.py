"""MoE layers of any size as modules, with random weights in memory, for benchmarks and tests of lowerings."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moec.dialects import aten
from moec.dialects.builtin import FuncOp, ModuleOp, WeightOp
from moec.dialects.moe import ExpertClass, ExpertsOp, Normalize, RouteOp, Routing
from moec.ir import DType, TensorType, Value, symbol
from moec.module import Module, SourceFacts
from moec.weights.context import WeightContext
from tests.ir.build import swiglu_body

TOKENS = symbol("batch")


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a SwiGLU MoE layer; `layers` of them, each with its own weights, follow one another."""

    experts: int
    hidden: int
    width: int
    top_k: int
    layers: int = 1

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in float32."""
        return 3 * self.hidden * self.width * 4


def moe_layers(shape: LayerShape, seed: int = 0, routing: Routing | None = None) -> Module:
    """x [batch, hidden] -> x + experts(x), `shape.layers` times."""
    generator = torch.Generator().manual_seed(seed)
    function = FuncOp.build("main", [_f32(TOKENS, shape.hidden)], arg_names=["x"])
    tensors: dict[str, torch.Tensor] = {}

    def weight(name: str, *sizes: int) -> Value:
        tensors[name] = torch.randn(sizes, generator=generator) * sizes[-1] ** -0.5
        op = WeightOp(result_types=[_f32(*sizes)], weight_name=name, source=name)
        function.body.append(op)
        return op.value

    value: Value = function.arguments[0]
    everyone = tuple(range(shape.experts))
    for layer in range(shape.layers):
        router = weight(f"layers.{layer}.router", shape.experts, shape.hidden)
        gate_up = weight(f"layers.{layer}.gate_up", shape.experts, 2 * shape.width, shape.hidden)
        down = weight(f"layers.{layer}.down", shape.experts, shape.hidden, shape.width)
        logits = aten.build("linear.default", {"input": value, "weight": router}, (_f32(TOKENS, shape.experts),))
        route = RouteOp(logits.result, routing=routing or Routing(k=shape.top_k, normalize=Normalize.SUM))
        experts = ExpertsOp(
            value,
            route.ids,
            route.gates,
            [gate_up, down],
            regions=[swiglu_body(shape.hidden, shape.width)],
            stored=everyone,
            classes=(ExpertClass(everyone, 2),),
        )
        total = aten.build("add.Tensor", {"self": value, "other": experts.y}, (_f32(TOKENS, shape.hidden),))
        for op in (logits, route, experts, total):
            function.body.append(op)
        value = total.result
    function.finish([value], ["y"])
    return Module(ModuleOp.build([function]), WeightContext(in_memory=tensors), SourceFacts("module"))


def _f32(*shape: object) -> TensorType:
    return TensorType(tuple(shape), DType.F32)  # type: ignore[arg-type]
