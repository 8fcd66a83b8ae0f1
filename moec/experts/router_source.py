"""What routers read, and whose logits a layer chooses by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from moec.dialects import aten
from moec.dialects.aten import AtenOp
from moec.dialects.builtin import ConstantOp, WeightOp
from moec.experts.edit import EditError
from moec.experts.layer import MoeLayer
from moec.experts.parts import (
    erase_unused,
    new_weight,
    route_with,
    settle_names,
    store_tensor,
    tensor_of,
)
from moec.experts.router_edit import put_route
from moec.ir import Operation, TensorType, Value
from moec.weights.context import WeightContext

_FROZEN = "router.frozen.weight"


def feed_router(
    layer: MoeLayer,
    weights: WeightContext,
    rows: Value,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> MoeLayer:
    """Lets the router read other rows [..., F], which are computed in front of it, through a weight [R, F] and a bias.

    Without a weight the router keeps its own, with its bias. The leading sizes of `rows` are those of what it read.
    Raises EditError for rows or weights that do not fit, UsageError where there is no store.
    """
    old = layer.router
    kind, before = tensor_of(rows), tensor_of(old.tensor("input"))
    width = kind.shape[-1]
    if kind.shape[:-1] != before.shape[:-1]:
        raise EditError(f"rows {kind} do not fit a router that reads {before}", where=layer.name)
    tensors: dict[str, Value | tuple[Value, ...]] = {"input": rows}
    if weight is None:
        tensors["weight"] = old.tensor("weight")
        if old.tensors("bias"):
            tensors["bias"] = old.tensors("bias")[0]
    else:
        name = f"{layer.name}.router"
        tensors["weight"] = new_weight(layer, f"{name}.weight", store_tensor(weights, weight), weight.shape)
        if bias is not None:
            tensors["bias"] = new_weight(layer, f"{name}.bias", store_tensor(weights, bias), bias.shape)
    taken = tensors["weight"]
    assert isinstance(taken, Value)
    if tensor_of(taken).shape != (layer.outputs, width):
        raise EditError(f"a router weight {tensor_of(taken)} does not fit rows {kind}", where=layer.name)
    logits = tensor_of(old.result)
    result = TensorType((*kind.shape[:-1], layer.outputs), logits.dtype)
    router = aten.build("linear.default", tensors, (result,), old.location)
    router.insert_before(old)
    old.result.replace_all_uses_with(router.result)
    erase_unused(old)
    settle_names(layer.experts)
    return replace(layer, router=router)


def freeze_router(layer: MoeLayer) -> None:
    """Marks the router as one that nobody trains, by the name of its weight."""
    weight = layer.router.tensor("weight").defining_op
    if not isinstance(weight, WeightOp):
        raise EditError("a router that is computed cannot be frozen", where=layer.name)
    weight.weight_name = f"{layer.name}.{_FROZEN}"


def is_frozen(layer: MoeLayer) -> bool:
    """Whether nobody may train the router."""
    weight = layer.router.tensor("weight").defining_op
    return isinstance(weight, WeightOp) and weight.weight_name.partition("#")[0].endswith(_FROZEN)


def router_weights(layer: MoeLayer) -> list[WeightOp]:
    """The weights between the rows that the layer's experts read and the logits, the router's first.

    Where the router reads something else than these rows, what makes that does not count, unless it is weights alone.
    """
    found = [value.defining_op for value in layer.router.operands[1:]]
    inner = [op for op in router_path(layer) if op is not layer.router]
    found += [value.defining_op for op in inner for value in op.operands]
    return [weight for weight in dict.fromkeys(found) if isinstance(weight, WeightOp)]


def replace_router_weights(layer: MoeLayer, weights: WeightContext, new: Mapping[WeightOp, torch.Tensor]) -> None:
    """Puts other tensors in the place of some of `router_weights`; other readers of these weights keep the old ones.

    Raises EditError for a shape that does not fit, UsageError where there is no store.
    """
    for weight, value in new.items():
        if tensor_of(weight.value).static_shape != tuple(value.shape):
            raise EditError(f"a weight of shape {list(value.shape)} does not fit {weight.value.type}", where=layer.name)
        source = store_tensor(weights, value)
        for op in router_path(layer):
            for index, operand in enumerate(op.operands):
                if operand is weight.value:
                    op.set_operand(index, new_weight(op, weight.weight_name, source, value.shape))
        erase_unused(weight)
    settle_names(layer.experts)


def router_path(layer: MoeLayer) -> list[Operation]:
    """The operations from the experts' rows, or from a table of tokens, to the router, in order, weights left out.

    The router alone where it reads other values of the model.
    """
    needed: dict[Operation, None] = {}
    frontier: list[Value] = [layer.router.tensor("input")]
    while frontier:
        value = frontier.pop()
        op = value.defining_op
        if value is layer.experts.x or isinstance(op, WeightOp | ConstantOp) or op in needed:
            continue
        if not isinstance(op, AtenOp):
            return [layer.router]
        needed[op] = None
        if op.name == "aten.embedding.default":
            if tensor_of(op.result).shape[-1] != layer.outputs:
                return [layer.router]
            continue
        frontier += op.operands
    block = layer.experts.parent
    assert block is not None
    return [*(op for op in block if op in needed), layer.router]


def follow_router(layer: MoeLayer, leader: MoeLayer) -> MoeLayer:
    """Lets a layer choose by the logits of an earlier layer's router instead of its own.

    Raises EditError where the two have different numbers of outputs or of tokens.
    """
    if layer.router is leader.router:
        return layer
    old = layer.route
    if tensor_of(leader.route.logits) != tensor_of(old.logits):
        raise EditError(
            f"logits {tensor_of(leader.route.logits)} of {leader.name} do not fit a route that reads "
            f"{tensor_of(old.logits)}",
            where=layer.name,
        )
    route = route_with(old, old.routing)
    route.set_operand(0, leader.route.logits)
    followed = put_route(layer, route)
    settle_names(followed.experts)
    return replace(followed, router=leader.router)
