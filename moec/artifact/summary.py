"""What a module holds, in numbers: its size, what one token uses of it, and its layers and experts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from moec.artifact.ledger import ModelSize
from moec.artifact.report import ExpertClassFacts, LayerFacts
from moec.artifact.weight_uses import WeightUse, slots_per_token, weight_uses, without_cast
from moec.dialects.builtin import WeightOp
from moec.dialects.moe import ExpertsOp, GroupScore, Normalize, RouteOp, Routing, Select
from moec.dialects.nn import MLPOp
from moec.ir import Region, TensorType, Value
from moec.weights.expression_parser import parse_expression

if TYPE_CHECKING:
    from moec.module import Module

_LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")
_ACTIVATIONS = {"silu": "SiLU", "gelu": "GELU", "relu": "ReLU", "sigmoid": "sigmoid", "tanh": "tanh"}
_GATED = {"SiLU": "SwiGLU", "GELU": "GeGLU", "ReLU": "ReGLU"}
_PRODUCTS = ("aten.linear.", "aten.mm.", "aten.matmul.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.")


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
    names: dict[str, list[WeightUse]] = {}
    for use in weight_uses(module):
        names.setdefault(layer_of(use.op.weight_name), []).append(use)
    experts = {layer_of_experts(op): op for op in module.op.walk() if isinstance(op, ExpertsOp)}
    blocks = [op for op in module.op.walk() if isinstance(op, MLPOp)]
    dense = {id(weight) for op in blocks for weight in _weight_ops(op.weights)}
    layers = list(dict.fromkeys([*names, *experts]))
    facts = [_one_layer(module, name, names.get(name, []), experts.get(name), dense) for name in layers if name]
    if "" in names:
        rest = sum(use.bytes for use in names[""])
        facts.append(LayerFacts(name="embedding and head", kind="other", other_bytes=rest))
    return tuple(facts)


def layer_of(weight_name: str) -> str:
    """The layer that a weight belongs to, such as `model.layers.3`; empty for one that belongs to none."""
    found = _LAYER.match(weight_name)
    return found.group(1) if found else ""


def layer_of_experts(op: ExpertsOp) -> str:
    """The layer that an operation's first stack of weights belongs to; empty if it has none."""
    return next((layer_of(weight.weight_name) for weight in _weight_ops(op.weights)), "")


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
    return ", ".join(words)


def _one_layer(
    module: Module, name: str, uses: Sequence[WeightUse], experts: ExpertsOp | None, dense: set[int]
) -> LayerFacts:
    total = sum(use.bytes for use in uses)
    feed_forward = sum(use.bytes for use in uses if id(use.op) in dense)
    if experts is None:
        return LayerFacts(name=name, kind="dense", feed_forward_bytes=feed_forward, other_bytes=total - feed_forward)
    routed = {id(weight) for weight in _weight_ops(experts.weights)}
    expert_bytes = sum(use.bytes for use in uses if id(use.op) in routed)
    route = experts.ids.defining_op
    return LayerFacts(
        name=name,
        kind="moe",
        router_outputs=len(experts.stored),
        top_k=slots_per_token(experts),
        routing=describe_routing(route.routing) if isinstance(route, RouteOp) else "",
        classes=tuple(_class_facts(module, experts)),
        stored=experts.stored,
        protected=experts.protected,
        expert_bytes=expert_bytes,
        feed_forward_bytes=feed_forward,
        other_bytes=total - feed_forward - expert_bytes,
    )


def _class_facts(module: Module, experts: ExpertsOp) -> Iterator[ExpertClassFacts]:
    for group, weights, region in experts.class_operands():
        own = sum(weight_bytes(module, weight) for weight in _weight_ops(weights[: group.stacks]))
        yield ExpertClassFacts(
            experts=group.experts,
            width=inner_width(region),
            body=describe_body(region),
            bytes_per_expert=own // len(group.experts),
            shared_bytes=sum(weight_bytes(module, weight) for weight in _weight_ops(weights[group.stacks :])),
        )


def describe_body(region: Region) -> str:
    """The kind of feed-forward block that a region computes, such as `SwiGLU`."""
    names = [op.name.removeprefix("aten.").split(".")[0] for op in region.block]
    activation = next((_ACTIVATIONS[name] for name in names if name in _ACTIVATIONS), "linear")
    if "mul" not in names:
        return activation
    return _GATED.get(activation, f"gated {activation}")


def inner_width(region: Region) -> int:
    """The width of the hidden layer of an expert body: the contracted size of its last matrix product; 0 if none."""
    for op in reversed(region.block):
        if op.name.startswith(_PRODUCTS):
            for operand in op.operands:
                shape = _shape(operand)
                if len(shape) >= 2 and not isinstance(shape[-2], int) and isinstance(shape[-1], int):
                    return shape[-1]
    return 0


def weight_bytes(module: Module, weight: WeightOp) -> int:
    """Bytes of a weight in the element type that it is stored in; the IR computes in float32 through a cast."""
    shape, dtype = module.weights.shape_dtype(without_cast(parse_expression(weight.source)))
    return math.prod(shape) * dtype.itemsize


def _weight_ops(values: Sequence[Value]) -> list[WeightOp]:
    return [value.defining_op for value in values if isinstance(value.defining_op, WeightOp)]


def _shape(value: Value) -> tuple[object, ...]:
    return tuple(value.type.shape) if isinstance(value.type, TensorType) else ()
