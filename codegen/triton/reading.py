"""From layers of the IR to kinds of layers for kernels, or a refusal with the reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moec.codegen.triton.activation import ActivationSource, spell_activation
from moec.codegen.triton.formats import code_matrix
from moec.codegen.triton.packing import CodedExpert, pack_experts
from moec.codegen.triton.rendering import ROUTE_OPERANDS
from moec.codegen.triton.spec import Element, LayerKind, RouteOperands
from moec.dialects.builtin import ConstantOp, WeightOp
from moec.dialects.moe import Select
from moec.errors import UnsupportedModelError
from moec.experts import FeedForward, MoeLayer, find_moe_layers, find_unreadable, load_expert
from moec.ir import DType, TensorType, Value
from moec.module import Module
from moec.weights.context import WeightContext

_LARGEST_MATRIX = 1 << 31
_LARGEST_COUNT = 4096
_PASSING = frozenset({"aten.view.default", "aten._to_copy.default", "aten.clone.default", "aten.alias.default"})


@dataclass(frozen=True)
class TritonLayer:
    """A layer for kernels. `tensors`: the router's, those of the route, the table of experts and their weights."""

    name: str
    kind: LayerKind
    tensors: dict[str, torch.Tensor]


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
    activation, experts = _load_experts(layer, weights)
    packed = pack_experts(experts, layer.hidden_size, element)
    largest = max(packed.widths)
    _check_sizes(layer, largest, 2 if activation.gated else 1)
    tensors = {"router": _values(layer.router.tensor("weight"), weights, layer.name).float()}
    bias = next(iter(layer.router.tensors("bias")), None)
    if bias is not None:
        tensors["router_bias"] = _values(bias, weights, layer.name).float()
    operands = {name: getattr(layer.route, name) for name in ROUTE_OPERANDS}
    for name, value in operands.items():
        if value is not None:
            found = _values(value, weights, layer.name)
            tensors[name] = found.to(torch.int32) if name == "mask" else found.float()
    tensors["stored"] = torch.tensor(layer.stored, dtype=torch.int32)
    kind = LayerKind(
        element=element,
        hidden_size=layer.hidden_size,
        outputs=layer.outputs,
        experts=layer.expert_count,
        top_k=layer.top_k,
        routing=layer.route.routing,
        route_operands=RouteOperands(**{name: value is not None for name, value in operands.items()}),
        router_bias=bias is not None,
        identity=layer.stored == tuple(range(layer.expert_count)),
        activation=activation,
        width=largest if set(packed.widths) == {largest} else 0,
        largest_width=largest,
        biases=packed.biases,
        input_formats=packed.input_formats,
        output_formats=packed.output_formats,
    )
    return TritonLayer(layer.name, kind, {**tensors, **packed.tensors})


def _load_experts(layer: MoeLayer, weights: WeightContext) -> tuple[ActivationSource, list[CodedExpert]]:
    found: list[CodedExpert] = []
    activation: ActivationSource | None = None
    for number in range(layer.expert_count):
        where = f"{layer.name}, expert {number}"
        expert = load_expert(layer, weights, number)
        if not isinstance(expert, FeedForward):
            raise UnsupportedModelError(
                f"the Triton backend has no kernel for an expert that is {type(expert).__name__.lower()}",
                where=where,
                hint="emit ONNX instead",
            )
        source = spell_activation(expert.activation, where)
        if activation is not None and source != activation:
            raise UnsupportedModelError("the experts of one layer have different activations", where=where)
        activation = source
        gate = None if expert.gate is None else code_matrix(expert.gate.matrix, where)
        up, down = code_matrix(expert.up.matrix, where), code_matrix(expert.down.matrix, where)
        if gate is not None and gate.format != up.format:
            raise UnsupportedModelError(
                f"gate is stored as {gate.format.name} and up as {up.format.name}; kernels read both in one format",
                where=where,
            )
        biases = [None if item is None else item.bias for item in (expert.gate, expert.up, expert.down)]
        found.append(CodedExpert(expert.width, gate, up, down, *biases))
    assert activation is not None
    return activation, found


def _check_route(layer: MoeLayer) -> None:
    route = layer.route
    problem = ""
    if route.routing.select is Select.FORCED:
        problem = "the model gives the choices itself"
    elif route.score_override is not None:
        problem = "the model gives the scores of some tokens itself"
    elif not _same_rows(layer.router.tensor("input"), layer.experts.x):
        problem = "its router reads other rows than its experts"
    for name in ROUTE_OPERANDS:
        value = getattr(route, name)
        if value is not None and (_kind(value).rank != 1 or not _is_stored(value)):
            problem = f"its {name.replace('_', ' ')} is computed"
    if problem:
        raise UnsupportedModelError(
            f"the Triton backend has no kernel for this routing: {problem}", where=layer.name, hint="emit ONNX instead"
        )


def _check_sizes(layer: MoeLayer, width: int, matrices: int) -> None:
    problem = ""
    count = max(layer.outputs, layer.expert_count)
    if matrices * width * layer.hidden_size >= _LARGEST_MATRIX:
        problem = f"a matrix of {matrices * width} x {layer.hidden_size} has more than 2^31 elements"
    elif count > _LARGEST_COUNT:
        problem = f"{count} experts are more than the {_LARGEST_COUNT} that fit a block"
    elif not width:
        problem = "all of its experts have width 0"
    if problem:
        raise UnsupportedModelError(f"the Triton backend cannot take this layer: {problem}", where=layer.name)


def _same_rows(one: Value, other: Value) -> bool:
    """Whether two values are the same numbers in the same order of rows."""
    return _origin(one) is _origin(other)


def _origin(value: Value) -> Value:
    op = value.defining_op
    while op is not None and op.name in _PASSING and _kind(op.operands[0]).shape[-1] == _kind(value).shape[-1]:
        value = op.operands[0]
        op = value.defining_op
    return value


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
