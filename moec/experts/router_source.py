"""What routers read, and whose logits a layer chooses by."""

from __future__ import annotations

from dataclasses import replace

import torch

from moec.dialects import aten
from moec.dialects.builtin import WeightOp
from moec.dialects.moe import ExpertsOp
from moec.experts.edit import EditError
from moec.experts.layer import MoeLayer
from moec.experts.parts import (
    copy_region,
    erase_unused,
    new_weight,
    route_with,
    settle_names,
    store_tensor,
    tensor_of,
)
from moec.ir import TensorType, Value
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


def follow_router(layer: MoeLayer, leader: MoeLayer) -> MoeLayer:
    """Lets a layer choose by the logits of an earlier layer's router instead of its own.

    Raises EditError where the two have different numbers of outputs or of tokens.
    """
    if layer.router is leader.router:
        return layer
    old, before = layer.route, layer.experts
    if tensor_of(leader.route.logits) != tensor_of(old.logits):
        raise EditError(
            f"logits {tensor_of(leader.route.logits)} of {leader.name} do not fit a route that reads "
            f"{tensor_of(old.logits)}",
            where=layer.name,
        )
    route = route_with(old, old.routing)
    route.insert_before(old)
    route.set_operand(0, leader.route.logits)
    experts = ExpertsOp(
        before.x,
        route.ids,
        route.gates,
        before.weights,
        regions=[copy_region(region) for region in before.regions],
        stored=before.stored,
        classes=before.classes,
        protected=before.protected,
        location=before.location,
    )
    experts.insert_before(before)
    before.y.replace_all_uses_with(experts.y)
    old.count.replace_all_uses_with(route.count)
    erase_unused(before)
    erase_unused(old)
    settle_names(experts)
    return replace(layer, route=route, experts=experts, router=leader.router)
