"""Fills layers with fewer experts up to the largest one's number, with router outputs that are never chosen.

It is exact only where something switches an output off: a bias of the router's logits whose gates come from the chosen
logits alone, or a selection bias beside scores that do not depend on other experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moec.codegen.huggingface.experts import Change
from moec.dialects.builtin import ModuleOp, WeightOp
from moec.dialects.moe import ChoiceOn, Score, Select, WeightFrom
from moec.experts import MoeLayer, find_moe_layers
from moec.ir import Operation, TensorType, Value
from moec.module import Module
from moec.weights.context import WeightContext
from moec.weights.expression import Concat, Expression, Reference, Slice
from moec.weights.expression_parser import parse_expression

_NEVER = "never chosen"
# Below every logit and score, and still finite in bfloat16.
_LOWEST = -1e30
_SCORES_ALONE = (Score.SIGMOID, Score.RELU, Score.SQRT_SOFTPLUS, Score.IDENTITY)


def fill_layers(module: Module) -> tuple[Module, tuple[Change, ...]]:
    """The module with equally many router outputs in every layer where that is exact, and what was filled.

    The added outputs name no expert. A module with a layer that cannot be filled is given back as it is.
    """
    if not can_fill(module):
        return module, ()
    layers = find_moe_layers(module.op)
    most = max(layer.outputs for layer in layers)
    smaller = [layer for layer in layers if layer.outputs < most]
    clone = module.op.clone()
    assert isinstance(clone, ModuleOp)
    lowest = {f"{_NEVER} {most - layer.outputs}": torch.full((most - layer.outputs,), _LOWEST) for layer in smaller}
    weights = WeightContext(module.weights.checkpoint, module.weights.store, lowest)
    changes = []
    for layer in find_moe_layers(clone):
        more = most - layer.outputs
        if more:
            _fill(layer, more)
            changes.append(Change(layer.name, f"{more} router outputs that are never chosen, so that it has {most}"))
    return Module(clone, weights, module.source), tuple(changes)


def can_fill(module: Module) -> bool:
    """Whether there are layers with fewer outputs than others, and each of them has something to switch outputs off."""
    layers = find_moe_layers(module.op)
    smaller = [layer for layer in layers if layer.outputs < max(other.outputs for other in layers)]
    return bool(smaller) and all(_switch(layer) is not None for layer in smaller)


def _switch(layer: MoeLayer) -> Value | None:
    """The weight, one number for each output, that can keep an output from being chosen without any other effect."""
    route, routing = layer.route, layer.route.routing
    if routing.select is not Select.TOPK or routing.groups > 1 or routing.null_experts or routing.skip_ratio:
        return None
    if any(value is not None for value in (route.mask, route.score_override, route.forced_ids)):
        return None
    if not all(_is_row_weight(value, layer.outputs) for value in _per_output(layer)):
        return None
    chosen_alone = routing.weight_from in (WeightFrom.SOFTMAX_SELECTED, WeightFrom.SIGMOID_LOGIT, WeightFrom.ONE)
    if not chosen_alone and routing.score not in _SCORES_ALONE:
        return None
    if route.select_bias is not None:
        return route.select_bias
    on_logits = routing.choice_on is ChoiceOn.LOGIT and not routing.softcap
    biases = layer.router.tensors("bias")
    return biases[0] if on_logits and chosen_alone and biases else None


def _per_output(layer: MoeLayer) -> Sequence[Value]:
    """The values with one row for each router output."""
    route, router = layer.route, layer.router
    found = [router.tensor("weight"), *router.tensors("bias"), route.logit_bias, route.select_bias]
    return [value for value in (*found, route.per_expert_scale) if value is not None]


def _is_row_weight(value: Value, outputs: int) -> bool:
    kind = value.type
    return isinstance(value.defining_op, WeightOp) and isinstance(kind, TensorType) and kind.shape[0] == outputs


def _fill(layer: MoeLayer, more: int) -> None:
    switch = _switch(layer)
    total = layer.outputs + more
    old = layer.outputs
    for value in _per_output(layer):
        longer = _longer(value, old, more, Reference(f"{_NEVER} {more}") if value is switch else None)
        for op in (layer.router, layer.route):
            for index, operand in enumerate(op.operands):
                if operand is value:
                    op.set_operand(index, longer)
    between: Operation | None = layer.route.logits.defining_op
    while between is not None:
        kind = between.results[0].type
        assert isinstance(kind, TensorType)
        between.results[0].type = TensorType((*kind.shape[:-1], total), kind.dtype)
        if "size" in between.attributes:
            between.attributes["size"] = (*kind.shape[:-1], total)
        between = None if between is layer.router else between.operands[0].defining_op
    layer.experts.stored = (*layer.stored, *[-1] * more)


def _longer(value: Value, rows: int, more: int, tail: Expression | None) -> Value:
    """A weight with more rows: `tail`, or repetitions of its own, which nothing depends on."""
    op, kind = value.defining_op, value.type
    assert isinstance(op, WeightOp) and isinstance(kind, TensorType)
    source = parse_expression(op.source)
    parts: list[Expression] = [source]
    left = more
    while left > 0:
        parts.append(tail or Slice(source, 0, 0, min(left, rows), 1))
        left = 0 if tail else left - rows
    longer = TensorType((rows + more, *kind.shape[1:]), kind.dtype)
    name, text = op.weight_name, str(Concat(0, tuple(parts)))
    weight = WeightOp(result_types=[longer], weight_name=name, source=text, location=op.location)
    weight.insert_before(op)
    return weight.value
