"""What a module holds, in numbers: its size, what one token uses of it, and its layers and experts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifact.ledger import ModelSize
from moec.artifact.report import ExpertClassFacts, LayerFacts
from moec.dialects.builtin import WeightOp
from moec.dialects.moe import ExpertsOp, GroupScore, Normalize, RouteOp, Routing, Select
from moec.dialects.nn import MLPOp
from moec.ir import Region, TensorType, Value

if TYPE_CHECKING:
    from moec.module import Module

_LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")
_ACTIVATIONS = {"silu": "SiLU", "gelu": "GELU", "relu": "ReLU", "sigmoid": "sigmoid", "tanh": "tanh"}
_GATED = {"SiLU": "SwiGLU", "GELU": "GeGLU", "ReLU": "ReGLU"}
_PRODUCTS = ("aten.linear.", "aten.mm.", "aten.matmul.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.")


@dataclass(frozen=True)
class _Use:
    """One weight operation: its elements, its bytes as stored, and the share of it that one token uses."""

    op: WeightOp
    elements: int
    bytes: int
    share: float
    multiplied: bool


def model_size(module: Module) -> ModelSize:
    """Parameters, bytes, active FLOPs per token and number of operations of a module; every weight counts once."""
    uses = list(_weight_uses(module))
    return ModelSize(
        parameters=sum(use.elements for use in uses),
        bytes=sum(use.bytes for use in uses),
        active_flops=round(sum(2 * use.elements * use.share for use in uses if use.multiplied)),
        operations=sum(1 for _ in module.op.walk()),
    )


def active_parameters(module: Module) -> int:
    """Parameters that one token uses, an embedding table counted whole."""
    return round(sum(use.elements * use.share for use in _weight_uses(module)))


def layer_facts(module: Module) -> tuple[LayerFacts, ...]:
    """The layers in the order of their first weight; what belongs to no layer comes last as `embedding and head`."""
    names: dict[str, list[_Use]] = {}
    for use in _weight_uses(module):
        names.setdefault(layer_of(use.op.weight_name), []).append(use)
    experts = {layer_of_experts(op): op for op in module.op.walk() if isinstance(op, ExpertsOp)}
    blocks = [op for op in module.op.walk() if isinstance(op, MLPOp)]
    dense = {id(weight) for op in blocks for weight in _weight_ops(op.weights)}
    facts = [_one_layer(module, name, uses, experts.get(name), dense) for name, uses in names.items() if name]
    if "" in names:
        rest = sum(use.bytes for use in names[""])
        facts.append(_facts("embedding and head", "other", None, "", (), 0, rest))
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
    module: Module, name: str, uses: Sequence[_Use], experts: ExpertsOp | None, dense: set[int]
) -> LayerFacts:
    feed_forward = sum(use.bytes for use in uses if id(use.op) in dense)
    rest = sum(use.bytes for use in uses if id(use.op) not in dense)
    if experts is None:
        return _facts(name, "dense", None, "", (), feed_forward, rest)
    groups = []
    for group, stacks, region in experts.class_operands():
        size = sum(weight_bytes(module, weight) for weight in _weight_ops(stacks))
        rest -= size
        groups.append(
            ExpertClassFacts(
                experts=group.experts,
                width=inner_width(region),
                body=describe_body(region),
                bytes_per_expert=size // len(group.experts),
            )
        )
    route = experts.ids.defining_op
    routing = describe_routing(route.routing) if isinstance(route, RouteOp) else ""
    return _facts(name, "moe", experts, routing, tuple(groups), feed_forward, max(rest, 0))


def _facts(
    name: str,
    kind: str,
    experts: ExpertsOp | None,
    routing: str,
    classes: tuple[ExpertClassFacts, ...],
    feed_forward: int,
    rest: int,
) -> LayerFacts:
    return LayerFacts(
        name=name,
        kind=kind,
        router_outputs=len(experts.stored) if experts else 0,
        top_k=slots_per_token(experts) if experts else 0,
        routing=routing,
        classes=classes,
        feed_forward_bytes=feed_forward,
        other_bytes=rest,
    )


def slots_per_token(experts: ExpertsOp) -> int:
    """The static number of slots per token: the most experts that a token can have."""
    slots = _shape(experts.ids)[1]
    return slots if isinstance(slots, int) else len(experts.stored)


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
    from moec.weights.expression import Cast
    from moec.weights.expression_parser import parse_expression

    expression = parse_expression(weight.source)
    while isinstance(expression, Cast):
        expression = expression.operand
    _, dtype = module.weights.shape_dtype(expression)
    return _elements(weight) * dtype.itemsize


def _weight_uses(module: Module) -> Iterator[_Use]:
    """Every distinct weight once. A weight that several operations name counts with its first name."""
    by_source: dict[str, list[WeightOp]] = {}
    for op in module.op.walk():
        if isinstance(op, WeightOp):
            by_source.setdefault(op.source, []).append(op)
    for ops in by_source.values():
        users = [user for op in ops for user in op.value.users]
        experts = [user for user in users if isinstance(user, ExpertsOp)]
        share = max(slots_per_token(user) / max(len(user.stored), 1) for user in experts) if experts else 1.0
        rank = len(_shape(ops[0].value))
        tables_only = bool(users) and all(user.name.startswith("aten.embedding.") for user in users)
        yield _Use(
            ops[0], _elements(ops[0]), weight_bytes(module, ops[0]), min(share, 1.0), rank >= 2 and not tables_only
        )


def _weight_ops(values: Sequence[Value]) -> list[WeightOp]:
    return [value.defining_op for value in values if isinstance(value.defining_op, WeightOp)]


def _elements(weight: WeightOp) -> int:
    count = 1
    for size in _shape(weight.value):
        count *= size if isinstance(size, int) else 1
    return count


def _shape(value: Value) -> tuple[object, ...]:
    return tuple(value.type.shape) if isinstance(value.type, TensorType) else ()
