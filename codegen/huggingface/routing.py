"""Routings that do the same under different spellings, and the fields of a config that decide them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, replace

from moec.codegen.huggingface.fields import Field, Values, with_field
from moec.dialects.moe import ChoiceOn, ExpertsOp, Normalize, RouteOp, Routing, Score, Select, WeightFrom
from moec.frontend.model_config import CONFIG_FILE, resolve_model

_ASCENDING = (Score.SOFTMAX, Score.SIGMOID, Score.SQRT_SOFTPLUS, Score.IDENTITY)
_WORDS = re.compile("norm|prob|scal|factor|rout")
_MOST_TRIED = 6


def canonical_routing(op: RouteOp) -> Routing:
    """The routing of an operation in one spelling, its scale left out where the experts can carry it."""
    routing = op.routing
    alone = op.select_bias is None and op.score_override is None and routing.groups == 1
    if alone and routing.select in (Select.TOPK, Select.ALL) and routing.score in _ASCENDING:
        routing = replace(routing, choice_on=ChoiceOn.LOGIT)
    if routing.select is Select.TOPK and routing.k == op.experts and alone and not routing.skip_ratio:
        routing = replace(routing, select=Select.ALL, k=0, k_max=0)
    normalised = routing.normalize is Normalize.SUM and not routing.norm_eps and not routing.norm_min
    plain = routing.score is Score.SOFTMAX and op.score_override is None and not routing.null_experts
    if routing.weight_from is WeightFrom.SCORE and plain and (normalised or routing.select is Select.ALL):
        routing = replace(routing, weight_from=WeightFrom.SOFTMAX_SELECTED, normalize=Normalize.NONE)
    return routing if routing.offset else replace(routing, scale=1.0)


def routing_difference(expected: RouteOp, found: RouteOp) -> str:
    """What the second one does otherwise, in words; empty where both do the same up to a factor of the result."""
    one, two = canonical_routing(expected), canonical_routing(found)
    parts = []
    for item in fields(Routing):
        left, right = getattr(one, item.name), getattr(two, item.name)
        if left != right:
            parts.append(f"{item.name} = {_shown(right)} instead of {_shown(left)}")
    return ", ".join(parts)


def _shown(value: object) -> str:
    return str(getattr(value, "value", value))


def factor_between(expected: ExpertsOp, found: ExpertsOp) -> float:
    """What the outputs of the second layer's experts are multiplied with beyond the first one's."""
    one, two = expected.gates.defining_op, found.gates.defining_op
    if not isinstance(one, RouteOp) or not isinstance(two, RouteOp):
        return 1.0
    if one.routing.offset or two.routing.offset or not one.routing.scale:
        return 1.0
    return two.routing.scale / one.routing.scale


def routing_candidates(values: Values, scales: tuple[float, float] | None, switch: bool) -> Iterator[Values]:
    """Values with another scalar that may decide how routers work: a switch the other way, or a factor.

    `scales`: the factor that the config's model has and the one that is wanted, None where layers differ in it.
    `switch`: whether more than a factor is wanted.
    """
    config = resolve_model(values, CONFIG_FILE).config.to_dict()
    named = sorted(name for name in config if _WORDS.search(name))
    starts = [values]
    if scales is not None and scales[0] != scales[1]:
        numbers = [name for name in named if type(config[name]) in (int, float) and config[name] == scales[0]]
        starts = [with_field(values, Field((name,), 0), scales[1]) for name in numbers[:_MOST_TRIED]] + starts
        yield from starts[:-1]
    switches = [name for name in named if switch and type(config[name]) is bool][:_MOST_TRIED]
    for name in switches:
        for start in starts:
            yield with_field(start, Field((name,), int(config[name])), not config[name])
