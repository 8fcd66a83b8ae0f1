"""Edits of a layer with experts: the only code that drops, reorders, shares or replaces experts.

Router rows, biases and scales per expert, slots and stacks of weights move together, and experts of equal body and
sizes form one class. Each edit gives the new `MoeLayer`; the old one is no longer valid. Weights that nobody reads any
more are left for `dce`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from moec.experts.classes import Draft, draft_of, may_share_class, rebuild
from moec.experts.expert import Expert
from moec.experts.layer import MoeLayer
from moec.experts.reading import load_expert
from moec.experts.router_edit import EditError, cut_router, replace_router, replace_routing, routing_of
from moec.weights.context import WeightContext

__all__ = [
    "EditError",
    "alias_experts",
    "cut_router",
    "permute_experts",
    "protect_experts",
    "replace_experts",
    "replace_router",
    "replace_routing",
    "slice_experts",
]


def slice_experts(layer: MoeLayer, keep: Sequence[int]) -> MoeLayer:
    """Keeps the router outputs `keep`, in this order; stored experts that none of them names are dropped.

    Tokens choose again among what is left. Raises EditError where fewer than k outputs would stay, where groups of
    experts would differ in size, or where something per expert is not a weight that can be cut.
    """
    chosen = list(keep)
    if len(set(chosen)) != len(chosen) or not all(0 <= output < layer.outputs for output in chosen):
        raise EditError(f"the outputs to keep {chosen} do not fit a router with {layer.outputs}", where=layer.name)
    if chosen == list(range(layer.outputs)):
        return layer
    routing = routing_of(layer, chosen)
    stored, kept = _renumber([layer.stored[output] for output in chosen])
    if not kept:
        raise EditError("no stored expert would be left", where=layer.name)
    return rebuild(layer, stored, [Draft.of(layer, expert) for expert in kept], rows=chosen, routing=routing)


def permute_experts(layer: MoeLayer, order: Sequence[int]) -> MoeLayer:
    """Router output i becomes what `order[i]` was; the stored experts keep their numbers."""
    if sorted(order) != list(range(layer.outputs)):
        raise EditError(f"{list(order)} is no order of {layer.outputs} router outputs", where=layer.name)
    if list(order) == list(range(layer.outputs)):
        return layer
    if layer.route.routing.groups > 1 or layer.route.routing.null_experts:
        raise EditError("outputs of a router with groups or empty outputs cannot change places", where=layer.name)
    stored, kept = _renumber([layer.stored[output] for output in order])
    return rebuild(layer, stored, [Draft.of(layer, expert) for expert in kept], rows=list(order))


def alias_experts(layer: MoeLayer, stored: Sequence[int]) -> MoeLayer:
    """Sends each router output to the stored expert that `stored` says, -1 for none; orphans are dropped.

    Raises EditError for a table that does not fit, or that leaves no expert.
    """
    if len(stored) != layer.outputs or not all(-1 <= expert < layer.expert_count for expert in stored):
        raise EditError(f"the table {list(stored)} does not fit {layer.expert_count} experts", where=layer.name)
    table, kept = _renumber(stored)
    if not kept:
        raise EditError("no stored expert would be left", where=layer.name)
    return rebuild(layer, table, [Draft.of(layer, expert) for expert in kept])


def replace_experts(layer: MoeLayer, weights: WeightContext, new: Mapping[int, Expert]) -> MoeLayer:
    """Puts other experts in the place of stored ones; their new tensors go to the store of `weights`.

    Experts that are not named keep their weights as they are in files. Raises EditError for an expert that is not
    there or has another hidden size, UsageError where there is no store.
    """
    if not new:
        return layer
    unknown = sorted(set(new) - set(range(layer.expert_count)))
    if unknown:
        raise EditError(f"there is no stored expert {unknown[0]} to replace", where=layer.name)
    drafts = []
    for number in range(layer.expert_count):
        expert = new.get(number)
        if expert is None and any(may_share_class(layer, number, other) for other in new.values()):
            # in the canonical form, so that it can be in one class with the new ones
            expert = load_expert(layer, weights, number)
        drafts.append(Draft.of(layer, number) if expert is None else draft_of(layer, weights, number, expert))
    return rebuild(layer, layer.stored, drafts, shape_of=lambda source: weights.shape_dtype(source)[0])


def protect_experts(layer: MoeLayer, experts: Iterable[int]) -> MoeLayer:
    """Marks stored experts, besides those that are marked, as not to be changed or dropped."""
    layer.experts.protected = tuple(sorted(layer.protected | set(experts)))
    return layer


def _renumber(stored: Sequence[int]) -> tuple[list[int], list[int]]:
    """(table with stored experts numbered by ascending old number, the old numbers that are left)."""
    kept = sorted({expert for expert in stored if expert >= 0})
    numbers = {expert: number for number, expert in enumerate(kept)}
    return [numbers.get(expert, -1) for expert in stored], kept
