"""Edits of the router of a layer: another weight, other stages, fewer outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from moec.dialects import aten
from moec.dialects.aten import AtenOp
from moec.dialects.builtin import ConstantOp, WeightOp
from moec.dialects.moe import ExpertsOp, RouteOp, Routing, Select
from moec.errors import UsageError
from moec.experts.layer import MoeLayer
from moec.experts.parts import (
    copy_region,
    erase_unused,
    logits_behind,
    new_weight,
    route_with,
    settle_names,
    static_shape_of,
    store_tensor,
    tensor_of,
)
from moec.experts.rows import rows_of
from moec.ir import DenseConstant, TensorType, Value
from moec.weights.context import WeightContext
from moec.weights.expression_parser import parse_expression


class EditError(UsageError):
    """An edit that a layer does not allow."""


def replace_router(
    layer: MoeLayer, weights: WeightContext, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> MoeLayer:
    """Gives the router another weight [R, H] and bias [R], which go to the store of `weights`; R stays.

    Raises EditError for other shapes, UsageError where there is no store.
    """
    if tuple(weight.shape) != static_shape_of(layer.router.tensor("weight")) or (
        bias is not None and tuple(bias.shape) != (layer.outputs,)
    ):
        raise EditError(f"a router weight of shape {list(weight.shape)} does not fit", where=layer.name)
    tensors: dict[str, Value | tuple[Value, ...]] = {"input": layer.router.tensor("input")}
    tensors["weight"] = new_weight(layer, f"{layer.name}.router.weight", store_tensor(weights, weight), weight.shape)
    if bias is not None:
        tensors["bias"] = new_weight(layer, f"{layer.name}.router.bias", store_tensor(weights, bias), bias.shape)
    router = aten.build("linear.default", tensors, (layer.router.result.type,), layer.router.location)
    router.insert_before(layer.router)
    layer.router.result.replace_all_uses_with(router.result)
    erase_unused(layer.router)
    settle_names(layer.experts)
    return replace(layer, router=router)


def replace_routing(layer: MoeLayer, routing: Routing) -> MoeLayer:
    """Gives the route other stages, above all another number of choices; tensors stay.

    Raises EditError for stages that do not fit the number of router outputs.
    """
    if routing == layer.route.routing:
        return layer
    problem = routing.problem(layer.outputs)
    if problem is not None:
        raise EditError(f"this router cannot choose so: {problem}", where=layer.name)
    return put_route(layer, route_with(layer.route, routing))


def put_route(layer: MoeLayer, route: RouteOp) -> MoeLayer:
    """Lets the experts of a layer follow `route`, which is not in a block yet, instead of the layer's own."""
    old, before = layer.route, layer.experts
    route.insert_before(old)
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
    return replace(layer, route=route, experts=experts)


def routing_of(layer: MoeLayer, keep: Sequence[int]) -> Routing:
    """The routing among fewer outputs; raises EditError."""
    routing: Routing = layer.route.routing
    if routing.groups > 1:
        size = layer.outputs // routing.groups
        counts = [sum(output // size == group for output in keep) for group in range(routing.groups)]
        ordered = [output // size for output in keep]
        if len(set(counts)) > 1 or ordered != sorted(ordered):
            raise EditError(
                f"the router chooses among {routing.groups} groups of equal size; {counts} outputs of them would stay",
                where=layer.name,
                hint="keep equally many experts of each group",
            )
    if routing.null_experts:
        nulls = set(range(layer.outputs - routing.null_experts, layer.outputs))
        left = [output for output in keep if output in nulls]
        if [output in nulls for output in keep] != sorted(output in nulls for output in keep):
            raise EditError("the outputs without experts must stay the last ones", where=layer.name)
        routing = replace(routing, null_experts=len(left))
    if routing.select in (Select.ENTROPY,) and routing.k_max:
        routing = replace(routing, k_max=len(keep))
    problem = routing.problem(len(keep))
    if problem is not None:
        raise EditError(
            f"{len(keep)} of {layer.outputs} router outputs cannot be kept: {problem}",
            where=layer.name,
            hint=f"a token chooses {routing.k}; keep at least as many",
        )
    return routing


def cut_router(layer: MoeLayer, rows: Sequence[int], routing: Routing) -> tuple[AtenOp, RouteOp]:
    """Router and route for the outputs `rows`; raises EditError."""
    old = layer.route
    if old.score_override is not None or old.forced_ids is not None:
        raise EditError("a route with forced choices cannot lose or move experts", where=layer.name)
    tensors: dict[str, Value | tuple[Value, ...]] = {"input": layer.router.tensor("input")}
    tensors["weight"] = _rows_of_value(layer, layer.router.tensor("weight"), rows)
    for bias in layer.router.tensors("bias"):
        tensors["bias"] = _rows_of_value(layer, bias, rows)
    kind = tensor_of(layer.router.result)
    router = aten.build(
        "linear.default", tensors, (TensorType((*kind.shape[:-1], len(rows)), kind.dtype),), layer.router.location
    )
    router.insert_before(layer.router)
    logits = logits_behind(layer, router.result, len(rows))
    pieces = [
        None if value is None else _rows_of_value(layer, value, rows)
        for value in (old.logit_bias, old.mask, old.select_bias, old.per_expert_scale)
    ]
    route = RouteOp(
        logits,
        pieces[0],
        pieces[1],
        None,
        None,
        pieces[2],
        None,
        pieces[3],
        routing=routing,
        location=old.location,
    )
    route.insert_before(old)
    if old.count.uses:
        old.count.replace_all_uses_with(route.count)
    return router, route


def _rows_of_value(layer: MoeLayer, value: Value, rows: Sequence[int]) -> Value:
    """Entries `rows` along dimension 0 of a weight or a constant; raises EditError for anything that is computed."""
    op = value.defining_op
    shape = tensor_of(value).shape
    if isinstance(op, WeightOp) and shape[0] == layer.outputs:
        source = rows_of(parse_expression(op.source), rows, layer.outputs)
        return new_weight(
            layer, op.weight_name, source, (len(rows), *static_shape_of(value)[1:]), tensor_of(value).dtype
        )
    if isinstance(op, ConstantOp) and shape[0] == layer.outputs:
        kind = tensor_of(value)
        step = len(op.data.data) // layer.outputs
        data = b"".join(op.data.data[row * step : (row + 1) * step] for row in rows)
        constant = ConstantOp(
            data=DenseConstant(data),
            result_types=[TensorType((len(rows), *kind.shape[1:]), kind.dtype)],
            location=op.location,
        )
        constant.insert_before(layer.router)
        return constant.value
    raise EditError(
        f"a value per expert of its router is computed by {op.name if op is not None else 'the caller'}",
        where=layer.name,
        hint="only weights and constants can be cut; `canonicalize` folds more into weights",
    )
