"""One layer with experts alone, on given rows: router, choice of experts, and what each expert makes of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moec.dialects.builtin import WeightOp
from moec.experts.layer import MoeLayer
from moec.ir import Operation, TensorType, Value
from moec.reference import aten_kernel, experts, nn_kernels, quant_kernel, route
from moec.reference.element_types import ElementTypes
from moec.reference.frame import ExpertsLowering, Frame, RunSettings
from moec.reference.kernels import prepare
from moec.reference.route import RouteInputs, route_inputs
from moec.reference.weight_loader import WeightLoader
from moec.weights.context import WeightContext

# imported for the kernels that they register
_KERNEL_MODULES = (aten_kernel, experts, nn_kernels, quant_kernel, route)


def route_inputs_of(
    layer: MoeLayer, weights: WeightContext, router_input: torch.Tensor, dtype: torch.dtype = torch.float32
) -> RouteInputs:
    """What the route of the layer reads for the rows `router_input` [n, H], to route them under other conditions."""
    frame = _frame(layer, weights, None, router_input, dtype)
    with torch.no_grad():
        for op in _between(layer):
            if op is layer.route:
                return route_inputs(layer.route, frame)
            frame.values.update(zip(op.results, prepare(op)(frame), strict=True))
    raise AssertionError("the route lies between the rows and the experts")


@dataclass(frozen=True)
class LayerRun:
    """`ids` int64 [n, K] router outputs, `gates` [n, K] (0 is an empty slot), `stored_ids` int64 [n, K] (-1 is no
    expert), `logits` [n, R], `y` [n, H] the layer's output (None where only the routing was asked for)."""

    ids: torch.Tensor
    gates: torch.Tensor
    stored_ids: torch.Tensor
    logits: torch.Tensor
    y: torch.Tensor | None


def run_layer(
    layer: MoeLayer,
    weights: WeightContext,
    x: torch.Tensor,
    router_input: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    with_experts: bool = True,
) -> LayerRun:
    """Routes the rows `router_input` [n, H], and computes the experts on `x` [n, H], in `dtype`.

    Raises as the reference executor does.
    """
    frame = _frame(layer, weights, x, router_input, dtype)
    steps = _between(layer)
    with torch.no_grad():
        for op in steps if with_experts else steps[:-1]:
            frame.values.update(zip(op.results, prepare(op)(frame), strict=True))
    ids, gates = frame.tensor(layer.route.ids), frame.tensor(layer.route.gates)
    stored = torch.tensor(layer.stored, dtype=torch.int64)[ids]
    stored = torch.where(gates != 0, stored, -1)
    y = frame.tensor(layer.experts.y) if with_experts else None
    return LayerRun(ids, gates, stored, frame.tensor(layer.route.logits), y)


def expert_outputs(layer: MoeLayer, weights: WeightContext, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """What the expert of each router output makes of rows `x` [n, H] with gate 1: [n, H] each, float32.

    It runs the experts' bodies as they are, so it knows experts that cannot be taken apart, too.
    """
    op = layer.experts
    compute = prepare(op)
    for output in range(layer.outputs):
        types = ElementTypes(torch.float32)
        settings = RunSettings(types, WeightLoader(weights, types), ExpertsLowering.GROUPED)
        frame = Frame(settings, symbols_of(layer, len(x)), {op.x: x.float()})
        frame.values[op.ids] = torch.full((len(x), 1), output, dtype=torch.int64)
        frame.values[op.gates] = torch.ones(len(x), 1)
        with torch.no_grad():
            yield compute(frame)[0]


def _frame(
    layer: MoeLayer, weights: WeightContext, x: torch.Tensor | None, router_input: torch.Tensor, dtype: torch.dtype
) -> Frame:
    types = ElementTypes(dtype)
    settings = RunSettings(types, WeightLoader(weights, types), ExpertsLowering.GROUPED)
    frame = Frame(settings, symbols_of(layer, len(router_input)), {})
    routed = layer.router.tensor("input")
    assert isinstance(routed.type, TensorType)
    # some routers read [batch, seq, H]
    frame.values[routed] = router_input.to(dtype).reshape([frame.size(size) for size in routed.type.shape])
    if x is not None and layer.experts.x is not routed:
        frame.values[layer.experts.x] = x.to(dtype)
    return frame


def _between(layer: MoeLayer) -> list[Operation]:
    """The operations that lead from the rows to the layer's output, in order, weights left out."""
    known = {layer.router.tensor("input"), layer.experts.x}
    needed: set[Operation] = set()
    frontier: list[Value] = [layer.experts.y]
    while frontier:
        value = frontier.pop()
        op = value.defining_op
        if value in known or op is None or op in needed or isinstance(op, WeightOp):
            continue
        needed.add(op)
        frontier.extend(op.operands)
    block = layer.experts.parent
    assert block is not None
    return [op for op in block if op in needed]


def symbols_of(layer: MoeLayer, rows: int) -> dict[str, int]:
    """Sizes under which the rows of the layer are `rows`: one sequence of that length."""
    names = {
        name
        for value in (layer.experts.x, layer.router.tensor("input"))
        for size in getattr(value.type, "shape", ())
        if not isinstance(size, int)
        for name in size.symbols()
    }
    symbols = dict.fromkeys(names, 1)
    symbols["seq" if "seq" in names else min(names, default="seq")] = rows
    return symbols
