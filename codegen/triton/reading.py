"""From layers of the IR to kinds of layers for kernels, or a refusal with the reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moec.codegen.triton.activation import LINEAR, ActivationSource
from moec.codegen.triton.beside import Block, SharedExpert, block_of, same_rows
from moec.codegen.triton.packing import CodedExpert, CodedMatrix, CodedProjection, pack_experts
from moec.codegen.triton.parts import parts_of
from moec.codegen.triton.rendering import ROUTE_OPERANDS
from moec.codegen.triton.router_path import RouterSource, UnspelledRouterError, spell_router
from moec.codegen.triton.spec import FLOAT, WIDTH_UNIT, Element, LayerKind, RouteOperands
from moec.dialects.builtin import ConstantOp, WeightOp
from moec.dialects.moe import Select
from moec.errors import UnsupportedModelError
from moec.experts import MoeLayer, find_moe_layers, find_unreadable, load_dense, load_expert
from moec.ir import DType, TensorType, Value
from moec.module import Module
from moec.weights.context import WeightContext

_LARGEST_MATRIX = 1 << 31
_LARGEST_COUNT = 4096


@dataclass(frozen=True)
class TritonLayer:
    """A layer for kernels. `tensors`: the router's, those of the route, the table of experts and their weights.

    `block` says which shared experts are computed with it, and which value of the IR is the result.
    """

    name: str
    kind: LayerKind
    tensors: dict[str, torch.Tensor]
    block: Block


@dataclass(frozen=True)
class _Slots:
    """The experts that slots name, their activations, which parts each stored expert has, and the gates of the rest."""

    experts: list[CodedExpert]
    activations: list[ActivationSource]
    parts: list[tuple[int, ...]]
    shared_gates: tuple[int, ...]
    gate_weights: list[torch.Tensor]


def layers_of(module: Module) -> tuple[MoeLayer, ...]:
    """The layers with experts. Raises UnsupportedModelError where there is none, or one that cannot be read."""
    for unreadable in find_unreadable(module.op):
        raise UnsupportedModelError(
            f"the Triton backend cannot take a layer with experts: {unreadable.reason}",
            where=unreadable.op.location.name or "moe.experts",
        )
    layers = find_moe_layers(module.op)
    if not layers:
        raise UnsupportedModelError(
            "the model has no layer with experts, and the Triton backend makes kernels for nothing else",
            hint="make experts first, or emit ONNX",
        )
    return layers


def read_layer(layer: MoeLayer, weights: WeightContext, element: Element) -> TritonLayer:
    """One layer with its weights packed. Memory is that of the layer. Raises UnsupportedModelError with the reason."""
    _check_route(layer)
    block = block_of(layer)
    slots = _load_slots(block, weights)
    packed = pack_experts(slots.experts, layer.hidden_size, element)
    largest = max(packed.widths)
    gated = any(item.gated for item in slots.activations)
    _check_sizes(layer, largest, 2 if gated else 1, len(slots.experts))
    router, tensors = _read_router(layer, weights)
    operands = {name: getattr(layer.route, name) for name in ROUTE_OPERANDS}
    for name, value in operands.items():
        if value is not None:
            found = _values(value, weights, layer.name)
            tensors[name] = found.to(torch.int32) if name == "mask" else found.float()
    parts = max((len(found) for found in slots.parts), default=1) or 1
    expanded = parts > 1 or bool(slots.shared_gates)
    # parts are numbered like the experts where each has one
    stored = [slots.parts[expert] if expert >= 0 else () for expert in layer.stored]
    if expanded:
        rows = [[*found, *[-1] * (parts - len(found))] for found in stored]
        tensors["parts"] = torch.tensor(rows, dtype=torch.int32)
        tensors["stored"] = torch.arange(len(slots.experts), dtype=torch.int32)
    else:
        tensors["stored"] = torch.tensor([found[0] if found else -1 for found in stored], dtype=torch.int32)
    if slots.gate_weights:
        tensors["shared_gates"] = torch.cat(slots.gate_weights).float()
    kind = LayerKind(
        element=element,
        hidden_size=layer.hidden_size,
        outputs=layer.outputs,
        experts=len(slots.experts),
        top_k=layer.top_k,
        routing=layer.route.routing,
        route_operands=RouteOperands(**{name: value is not None for name, value in operands.items()}),
        router=router,
        identity=expanded or stored == [(number,) for number in range(len(slots.experts))],
        activations=tuple(slots.activations),
        width=largest if set(packed.widths) == {largest} else 0,
        largest_width=largest,
        biases=packed.biases,
        input_formats=packed.input_formats,
        output_formats=packed.output_formats,
        scattered=packed.scattered,
        optional=packed.optional,
        factors=packed.factors,
        parts=parts,
        shared_gates=slots.shared_gates,
    )
    return TritonLayer(layer.name, kind, {**tensors, **packed.tensors}, block)


def _read_router(layer: MoeLayer, weights: WeightContext) -> tuple[RouterSource | None, dict[str, torch.Tensor]]:
    """The lines of a router that is more than a linear map of the experts' rows, and its tensors."""
    if same_rows(layer.router.tensor("input"), layer.experts.x):
        tensors = {"router": _values(layer.router.tensor("weight"), weights, layer.name).float()}
        bias = next(iter(layer.router.tensors("bias")), None)
        if bias is not None:
            tensors["router_bias"] = _values(bias, weights, layer.name).float()
        return None, tensors
    try:
        source, values = spell_router(layer)
    except UnspelledRouterError as problem:
        raise UnsupportedModelError(
            f"the Triton backend has no form of this layer: its router {problem}",
            where=layer.name,
            hint="emit ONNX, or give it a router that reads what its experts read (init-router)",
        ) from problem
    found = [_values(value, weights, layer.name) for value in values]
    return source, {
        f"router_{number}": value.float() if value.is_floating_point() else value for number, value in enumerate(found)
    }


def _load_slots(block: Block, weights: WeightContext) -> _Slots:
    layer = block.layer
    found = _Slots([], [], [], (), [])
    for number in range(layer.expert_count):
        where = f"{layer.name}, expert {number}"
        new = parts_of(load_expert(layer, weights, number), found.activations, where)
        found.parts.append(tuple(range(len(found.experts), len(found.experts) + len(new))))
        found.experts.extend(new)
    gates: list[int] = []
    for shared in block.shared:
        new = parts_of(load_dense(shared.dense, weights), found.activations, shared.dense.name)
        gates += [_gate_row(shared, weights, found.gate_weights)] * len(new)
        found.experts.extend(new)
    if not any(expert.width for expert in found.experts):
        # constants alone: kernels have a width at least
        found.experts[0] = _wide(found.experts[0], layer.hidden_size)
        if not found.activations:
            found.activations.append(LINEAR)
    return _Slots(found.experts, found.activations, found.parts, tuple(gates), found.gate_weights)


def _gate_row(shared: SharedExpert, weights: WeightContext, rows: list[torch.Tensor]) -> int:
    if shared.gate is None:
        return -1
    rows.append(weights.load(shared.gate.source))
    return len(rows) - 1


def _wide(expert: CodedExpert, hidden_size: int) -> CodedExpert:
    """An expert of width 0 with one step of neurons that are zero."""
    up = CodedProjection(CodedMatrix(FLOAT, torch.zeros(WIDTH_UNIT, hidden_size)))
    down = CodedProjection(CodedMatrix(FLOAT, torch.zeros(hidden_size, WIDTH_UNIT)), bias=expert.down.bias)
    return CodedExpert(WIDTH_UNIT, None, up, down)


def _check_route(layer: MoeLayer) -> None:
    """Refuses what a block of a model is not given: it gets rows alone. All stages that rows decide have a kernel."""
    route = layer.route
    problem = hint = ""
    if route.routing.select is Select.FORCED:
        problem, hint = "the model gives the choices itself", "choose by a router (set-routing{k=2})"
    elif route.score_override is not None:
        problem, hint = "the model gives the scores of some tokens itself", "let the router score all tokens"
    for name in ROUTE_OPERANDS:
        value = getattr(route, name)
        if value is not None and (_kind(value).rank != 1 or not _is_stored(value)):
            problem = f"its {name.replace('_', ' ')} is computed"
            hint = "give it one stored number for each expert"
    if problem:
        raise UnsupportedModelError(
            f"the Triton backend has no kernel for this routing: {problem}",
            where=layer.name,
            hint=f"{hint}, or emit ONNX",
        )


def _check_sizes(layer: MoeLayer, width: int, matrices: int, experts: int) -> None:
    problem = ""
    count = max(layer.outputs, experts)
    if matrices * width * layer.hidden_size >= _LARGEST_MATRIX:
        problem = f"a matrix of {matrices * width} x {layer.hidden_size} has more than 2^31 elements"
    elif count > _LARGEST_COUNT:
        problem = f"{count} experts are more than the {_LARGEST_COUNT} that fit a block"
    if problem:
        raise UnsupportedModelError(f"the Triton backend cannot take this layer: {problem}", where=layer.name)


def _is_stored(value: Value) -> bool:
    op = value.defining_op
    return isinstance(op, WeightOp) or (isinstance(op, ConstantOp) and _kind(value).dtype in (DType.F32, DType.I1))


def _values(value: Value, weights: WeightContext, where: str) -> torch.Tensor:
    op = value.defining_op
    if isinstance(op, WeightOp):
        return weights.load(op.source)
    if isinstance(op, ConstantOp):
        dtype = torch.bool if _kind(value).dtype is DType.I1 else torch.float32
        return torch.frombuffer(bytearray(op.data.data), dtype=dtype).reshape(_kind(value).static_shape)
    raise UnsupportedModelError("a weight of the router is computed", where=where)


def _kind(value: Value) -> TensorType:
    assert isinstance(value.type, TensorType)
    return value.type
