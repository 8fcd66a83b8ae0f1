"""A layer in two: experts that run in full for the best ranks, and modules in their place for the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from moec.dialects.moe import ExpertsOp, Normalize, RouteOp, Routing, Select, WeightFrom
from moec.experts import Expert, MoeLayer, alias_experts, replace_experts
from moec.experts.parts import route_with
from moec.ir import Location, TensorType, Value
from moec.passes.auxiliary_experts.fitting import Base
from moec.passes.building import Builder
from moec.passes.matching import shape, tensor
from moec.weights.context import WeightContext

# A sum of gates below this is none.
_SMALLEST_SUM = torch.finfo(torch.float32).tiny


def split_layer(
    layer: MoeLayer, weights: WeightContext, main: int, base: Base, modules: Mapping[int, Expert]
) -> ExpertsOp:
    """Ranks below `main` go to the experts, the others to the modules; the sum of both takes the layer's place.

    Slots keep the ids and gates of the layer's route, so modules get what their experts got; with `Base.RENORM` the
    gates of the main slots are scaled to the sum of all. Experts without a module give nothing for the other ranks,
    unless they are protected: these run in full for every rank. Gives the operation of the main slots.
    """
    route, old = layer.route, layer.experts
    build = Builder(lambda op: op.insert_before(old))
    kept = _route_with(layer, narrowed(route, main, base), build)
    if kept is not None:
        first = _copy(old, kept.ids, kept.gates)
    else:
        gates = build.channels(route.gates, 0, main)
        gates = _scaled(build, gates, route.gates) if base is Base.RENORM else gates
        first = _copy(old, build.channels(route.ids, 0, main), gates)
    build.insert(first)
    result: Value = first.y
    second = _auxiliary(layer, weights, modules)
    if second is not None:
        slots = layer.top_k - main
        second.set_operand(1, build.channels(route.ids, main, slots))
        second.set_operand(2, build.channels(route.gates, main, slots))
        _move_before(second, old)
        result = build.aten("add.Tensor", {"self": first.y, "other": second.y}, tensor(old.y))
    old.replace_with([result])
    if not route.has_uses:
        route.erase()
    return first


def narrowed(route: RouteOp, main: int, base: Base) -> Routing | None:
    """The routing that gives the main slots and their gates by itself; None where no routing does."""
    routing: Routing = route.routing
    plain = routing.select is Select.TOPK and not routing.null_experts and not routing.rank_offset
    if not plain or routing.skip_ratio or routing.slots(route.experts) != routing.k:
        return None
    over_selected = routing.weight_from is WeightFrom.SOFTMAX_SELECTED or routing.normalize is Normalize.SUM
    if over_selected != (base is Base.RENORM) or (over_selected and route.per_expert_scale is not None):
        return None
    if routing.norm_min or routing.norm_eps > 1e-6:
        return None
    return replace(routing, k=main, k_max=0)


def _route_with(layer: MoeLayer, routing: Routing | None, build: Builder) -> RouteOp | None:
    """A route on the layer's logits; None for no routing."""
    if routing is None:
        return None
    found = route_with(layer.route, routing)
    build.insert(found)
    return found


def _scaled(build: Builder, gates: Value, all_gates: Value) -> Value:
    """Gates [T, main] times the sum of all gates over their own."""
    kind = TensorType((shape(gates)[0], 1), tensor(gates).dtype)

    def total(value: Value) -> Value:
        return build.aten("sum.dim_IntList", {"self": value}, kind, dim=(1,), keepdim=True)

    own = build.aten("clamp_min.default", {"self": total(gates)}, kind, min=_SMALLEST_SUM)
    ratio = build.aten("div.Tensor", {"self": total(all_gates), "other": own}, kind)
    return build.aten("mul.Tensor", {"self": gates, "other": ratio}, tensor(gates))


def _copy(old: ExpertsOp, ids: Value, gates: Value) -> ExpertsOp:
    copy = old.clone()
    assert isinstance(copy, ExpertsOp)
    copy.set_operand(1, ids)
    copy.set_operand(2, gates)
    return copy


def _auxiliary(layer: MoeLayer, weights: WeightContext, modules: Mapping[int, Expert]) -> ExpertsOp | None:
    """The modules and the protected experts, with the ids and gates of the layer's own route; None where there are
    none."""
    stays = frozenset(modules) | layer.protected
    if not stays:
        return None
    copy = _copy(layer.experts, layer.experts.ids, layer.experts.gates)
    location: Location = layer.experts.location
    copy.location = replace(location, name=f"{location.name or 'experts'}.auxiliary")
    copy.insert_before(layer.experts)
    other = replace(layer, name=f"{layer.name}.auxiliary", experts=copy)
    other = replace_experts(other, weights, modules)
    table = [expert if expert in stays else -1 for expert in other.stored]
    if table != list(other.stored):
        other = alias_experts(other, table)
    return other.experts


def _move_before(op: ExpertsOp, anchor: ExpertsOp) -> None:
    """Behind what was inserted for its operands since."""
    op.detach()
    op.insert_before(anchor)
