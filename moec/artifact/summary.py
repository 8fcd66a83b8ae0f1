"""What a module holds, in numbers: its size, what one token uses of it, and its layers and experts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moec.artifact.expert_facts import class_facts, expert_use
from moec.artifact.ledger import ModelSize
from moec.artifact.report import LayerFacts
from moec.dialects.builtin import WeightOp
from moec.dialects.moe import ExpertsOp, GroupScore, Normalize, RouteOp, Routing, Select
from moec.dialects.nn import MLPOp
from moec.ir import Value
from moec.weights.uses import WeightUse, slots_per_token, weight_uses

if TYPE_CHECKING:
    from moec.module import Module

_LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")


def model_size(module: Module) -> ModelSize:
    """Parameters, bytes, active FLOPs per token and number of operations of a module; every weight counts once."""
    uses = weight_uses(module)
    return ModelSize(
        parameters=sum(use.elements for use in uses),
        bytes=sum(use.bytes for use in uses),
        active_flops=round(sum(2 * use.elements * use.products for use in uses)),
        operations=sum(1 for _ in module.op.walk()),
    )


def active_parameters(module: Module) -> int:
    """Parameters that one token uses, an embedding table counted whole."""
    return round(sum(use.elements * use.read for use in weight_uses(module)))


def layer_facts(module: Module) -> tuple[LayerFacts, ...]:
    """The layers in the order of their first weight; what belongs to no layer comes last as `embedding and head`.

    A weight that several layers share counts in the first.
    """
    experts: dict[str, list[ExpertsOp]] = {}
    for op in module.op.walk():
        if isinstance(op, ExpertsOp):
            experts.setdefault(layer_of_experts(op), []).append(op)
    readers = {id(weight): name for name, ops in experts.items() for op in ops for weight in _weight_ops(op.weights)}
    names: dict[str, list[WeightUse]] = {}
    for use in weight_uses(module):
        own = layer_of(use.op.weight_name)
        names.setdefault(own or readers.get(id(use.op), ""), []).append(use)
    blocks = [op for op in module.op.walk() if isinstance(op, MLPOp)]
    dense = {id(weight) for op in blocks for weight in _weight_ops(op.weights)}
    layers = list(dict.fromkeys([*names, *experts]))
    facts: list[LayerFacts] = []
    for name in layers:
        if name:
            facts += _one_layer(module, name, names.get(name, []), experts.get(name, []), dense)
    if "" in names:
        rest = sum(use.bytes for use in names[""])
        facts.append(LayerFacts(name="embedding and head", kind="other", other_bytes=rest))
    return tuple(facts)


def layer_of(weight_name: str) -> str:
    """The layer that a weight belongs to, such as `model.layers.3`; empty for one that belongs to none."""
    found = _LAYER.match(weight_name)
    return found.group(1) if found else ""


def layer_of_experts(op: ExpertsOp) -> str:
    """The layer that experts belong to, by their own name or that of their first weight; empty for none."""
    return layer_of(op.location.name) or next((layer_of(weight.weight_name) for weight in _weight_ops(op.weights)), "")


def describe_routing(routing: Routing) -> str:
    """The stages of `routing` that are not the identity, in a few words."""
    words = [routing.score.value.replace("_", " ")]
    if routing.limits_groups:
        rating = "best two" if routing.group_score is GroupScore.SUM_TOP2 else "best"
        words.append(f"{routing.topk_groups} of {routing.groups} groups by their {rating}")
    words.append(f"top-{routing.k}" if routing.select is Select.TOPK else routing.select.value.replace("_", " "))
    if routing.weight_from.value != "score":
        words.append(f"gates from {routing.weight_from.value.replace('_', ' ')}")
    if routing.normalize is Normalize.SUM:
        words.append("renormalised")
    if routing.scale != 1.0:
        words.append(f"scaled by {routing.scale:g}")
    if routing.offset:
        words.append(f"plus {routing.offset:g}")
    return ", ".join(words)


def _one_layer(
    module: Module, name: str, uses: Sequence[WeightUse], experts: Sequence[ExpertsOp], dense: set[int]
) -> list[LayerFacts]:
    """The layer, and one more entry for each further operation of experts in it, such as auxiliary ones."""
    feed_forward = sum(use.bytes for use in uses if id(use.op) in dense)
    rest = sum(use.bytes for use in uses) - feed_forward
    if not experts:
        return [LayerFacts(name=name, kind="dense", feed_forward_bytes=feed_forward, other_bytes=rest)]
    facts: list[LayerFacts] = []
    counted: set[int] = set()
    for op in experts:
        routed = {id(weight) for weight in _weight_ops(op.weights)} - counted
        counted |= routed
        size = sum(use.bytes for use in uses if id(use.op) in routed)
        rest -= size
        route = op.ids.defining_op
        facts.append(
            LayerFacts(
                name=f"{name} {op.location.name.rpartition('.')[2]}" if facts else name,
                kind="moe",
                router_outputs=len(op.stored),
                top_k=slots_per_token(op),
                routing=describe_routing(route.routing) if isinstance(route, RouteOp) else "",
                classes=tuple(class_facts(module, op)),
                stored=op.stored,
                protected=op.protected,
                use=expert_use(module, op),
                expert_bytes=size,
            )
        )
    facts[0] = facts[0].model_copy(update={"feed_forward_bytes": feed_forward, "other_bytes": rest})
    return facts


def _weight_ops(values: Sequence[Value]) -> list[WeightOp]:
    return [value.defining_op for value in values if isinstance(value.defining_op, WeightOp)]
