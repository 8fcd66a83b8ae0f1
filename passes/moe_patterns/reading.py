"""Reads the stages of `moe.route` off aten arithmetic, walking backwards from the ids and gates of `moe.experts`.

The walk ends where it meets something that is no stage: that value is the router logits, and whatever computes them
stays as it is. Nothing here decides whether a reading is right; `check` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from moec.dialects.aten import AtenOp
from moec.dialects.moe import ChoiceOn, GroupFill, GroupScore, Normalize, Routing, Score, Select, WeightFrom
from moec.ir import Value
from moec.passes.matching import (
    added_number,
    both_orders,
    channel_vector,
    is_last_axis,
    is_view,
    made_by,
    number,
    same,
    scaled_by_number,
    shape,
    tensor,
)
from moec.passes.moe_patterns.groups import read_groups
from moec.passes.moe_patterns.sparsemixer import read_sparsemixer


class UnreadableRouterError(Exception):
    """The arithmetic is no routing that `moe.route` can say; the text says where the reading ended."""


@dataclass(frozen=True)
class RouterReading:
    """Operands and stages of the `moe.route` that `ids` and `gates` were read as. `logits` is [..., experts]."""

    logits: Value
    routing: Routing
    select_bias: Value | None = None
    per_expert_scale: Value | None = None


def read_router(ids: Value, gates: Value) -> list[RouterReading]:
    """All readings of router arithmetic, most specific first. Raises UnreadableRouterError where there is none."""
    mixer = read_sparsemixer(_plain(ids), _plain(gates))
    if mixer is not None:
        logits, jitter = mixer
        return [RouterReading(logits, Routing(select=Select.SPARSEMIXER, k=2, jitter_eps=jitter))]
    ids, gates, first_null = _without_nulls(_plain(ids), _plain(gates))
    selection = _read_selection(_plain(ids))
    weighting = _read_weighting(gates, selection)
    readings = []
    for choice in _read_choice(selection):
        reading = _combine(selection, choice, weighting)
        if reading is not None and first_null is not None:
            reading = _with_nulls(reading, first_null)
        if reading is not None:
            readings.append(reading)
    if not readings:
        raise UnreadableRouterError("the gates are not a function of the logits that the experts are chosen by")
    return readings


# -- null experts --------------------


def _without_nulls(ids: Value, gates: Value) -> tuple[Value, Value, int | None]:
    """(ids, gates, n) before both became 0 where the id is n, or n and more; n is None where they did not."""
    found, weighed = _zeroed(ids), _zeroed(gates)
    if found is None or weighed is None or not same(found[1], weighed[1]):
        return ids, gates, None
    border = made_by(found[1], "eq.Scalar", "ge.Scalar")
    if border is None or not same(border.tensor("self"), found[0]):
        return ids, gates, None
    first_null = int(border.argument("other"))
    if border.name == "aten.eq.Scalar" and shape(_read_selection(_plain(found[0])).choice)[-1] != first_null + 1:
        return ids, gates, None
    return found[0], weighed[0], first_null


def _zeroed(value: Value) -> tuple[Value, Value] | None:
    """(x, condition) where `value` is x, but 0 where the condition holds."""
    where = made_by(value, "where.self")
    if where is not None and number(where.tensor("self")) == 0.0:
        return where.tensor("other"), where.tensor("condition")
    fill = made_by(value, "masked_fill.Scalar")
    if fill is not None and fill.argument("value") == 0:
        return fill.tensor("self"), fill.tensor("mask")
    return None


def _with_nulls(reading: RouterReading, first_null: int) -> RouterReading | None:
    """The reading with the experts from `first_null` on as null experts."""
    experts = shape(reading.logits)[-1]
    if not isinstance(experts, int) or not 0 < first_null < experts:
        return None
    return replace(reading, routing=replace(reading.routing, null_experts=experts - first_null))


# -- selection --------------------


@dataclass(frozen=True)
class _Selection:
    """The best `k` of `choice`; `values` are the chosen choice values where the trace uses them."""

    ids: Value
    choice: Value
    k: int
    values: Value | None


def _read_selection(ids: Value) -> _Selection:
    top = made_by(ids, "topk.default")
    if top is not None and ids is top.results[1]:
        if not is_last_axis(top) or not top.argument("largest"):
            raise UnreadableRouterError("the experts are not the best ones along the last axis")
        return _Selection(ids, top.tensor("self"), top.argument("k"), top.results[0])
    best = made_by(ids, "max.dim", "argmax.default")
    if best is not None and best.argument("keepdim") and is_last_axis(best):
        values = best.results[0] if best.name == "aten.max.dim" else None
        return _Selection(ids, best.tensor("self"), 1, values)
    head = made_by(ids, "slice.Tensor")
    if head is not None and is_last_axis(head) and not head.argument("start") and head.argument("step") == 1:
        order = head.tensor("self")
        sort = made_by(order, "sort.default", "sort.stable", "argsort.default", "argsort.stable")
        k = shape(ids)[-1]
        if sort is not None and sort.argument("descending") and is_last_axis(sort) and isinstance(k, int):
            return _Selection(ids, sort.tensor("self"), k, None)
    made = ids.defining_op
    raise UnreadableRouterError(f"the expert ids come from {made.name if made else 'an argument'}, which is no top-k")


# -- choice --------------------


@dataclass(frozen=True)
class _Choice:
    """The choice values as a function of `logits`: `score` (None: the logits themselves), `select_bias`, groups."""

    logits: Value
    score: Score | None
    base: Value
    select_bias: Value | None
    stages: Routing


def _read_choice(selection: _Selection) -> Iterator[_Choice]:
    """Readings of the choice values; a score function that is recognised comes before the same value as logits."""
    value, stages = _plain(selection.choice), Routing(k=selection.k)
    groups = read_groups(value)
    if groups is not None:
        value = _plain(groups.choice)
        stages = replace(
            stages,
            groups=groups.count,
            topk_groups=groups.kept,
            group_score=GroupScore.MAX if groups.best == 1 else GroupScore.SUM_TOP2,
            group_fill=GroupFill.ZERO if groups.fill == 0.0 else GroupFill.NEG_INF,
        )
        if groups.kept >= groups.count:
            stages = Routing(k=selection.k)
    candidates: list[tuple[Value, Value | None]] = []
    added = made_by(value, "add.Tensor")
    if added is not None and added.argument("alpha") == 1:
        for base, other in both_orders(added):
            bias = channel_vector(other, base)
            if bias is not None and tensor(base) == tensor(value):
                candidates.append((_plain(base), bias))
    candidates.append((value, None))
    for base, bias in candidates:
        scored = _scored(base)
        if scored is not None:
            yield _Choice(_plain(scored[1]), scored[0], base, bias, stages)
        yield _Choice(base, None, base, bias, stages)


def _scored(value: Value) -> tuple[Score, Value] | None:
    """(function, z) where `value` holds scores of the logits z."""
    softmax = made_by(value, "softmax.int", "_softmax.default")
    if softmax is not None and is_last_axis(softmax):
        return Score.SOFTMAX, softmax.tensor("self")
    for name, score in (("sigmoid.default", Score.SIGMOID), ("relu.default", Score.RELU)):
        op = made_by(value, name)
        if op is not None:
            return score, op.tensor("self")
    root = made_by(value, "sqrt.default")
    power = made_by(value, "pow.Tensor_Scalar")
    rooted = root or (power if power is not None and power.argument("exponent") == 0.5 else None)
    softplus = made_by(rooted.tensor("self"), "softplus.default") if rooted is not None else None
    if softplus is not None and softplus.argument("beta") == 1:
        return Score.SQRT_SOFTPLUS, softplus.tensor("self")
    return None


# -- weighting --------------------


@dataclass(frozen=True)
class _Weighting:
    """What gates are made of: values of `source` at the ids, under `function` (softmax over the selected ones, or a
    score), then the stages 12 and 13."""

    source: Value | None
    function: Score | None
    stages: dict[str, float | Normalize] = field(default_factory=dict)
    per_expert_scale: Value | None = None


def _read_weighting(gates: Value, selection: _Selection) -> _Weighting:
    """`source` is None for gates that are all one."""
    value = _plain(gates)
    scale, per_expert = 1.0, None
    while True:
        scaled = scaled_by_number(value)
        weighted = _scaled_per_expert(value, selection)
        if scaled is not None:
            value, scale = _plain(scaled[0]), scale * scaled[1]
        elif weighted is not None and per_expert is None:
            value, per_expert = _plain(weighted[0]), weighted[1]
        else:
            break
    stages: dict[str, float | Normalize] = {"scale": scale}
    normalised = _normalised(value)
    if normalised is not None:
        value, sum_stages = normalised
        stages.update(sum_stages)
    picked = _picked(value, selection)
    if picked is not None:
        return _Weighting(picked, None, stages, per_expert)
    if made_by(value, "ones_like.default") is not None:
        return _Weighting(None, None, stages, per_expert)
    scored = _scored(value)
    picked = _picked(_plain(scored[1]), selection) if scored is not None else None
    if scored is None or picked is None:
        made = value.defining_op
        name = made.name if made else "an argument"
        raise UnreadableRouterError(f"the gates come from {name}, which is no weighting of the chosen experts")
    return _Weighting(picked, scored[0], stages, per_expert)


def _picked(value: Value, selection: _Selection) -> Value | None:
    """The tensor over all experts whose entries at the ids `value` is."""
    if value is selection.values:
        return _plain(selection.choice)
    gather = made_by(value, "gather.default")
    if gather is not None and is_last_axis(gather) and _plain(gather.tensor("index")) is selection.ids:
        return _plain(gather.tensor("self"))
    return None


def _scaled_per_expert(value: Value, selection: _Selection) -> tuple[Value, Value] | None:
    """(g, s) where `value` is g * s[ids]."""
    product = made_by(value, "mul.Tensor")
    if product is None:
        return None
    for inner, factor in both_orders(product):
        looked_up = made_by(_plain(factor), "index.Tensor")
        if looked_up is None:
            continue
        indices = looked_up.positioned_tensors("indices")
        vector = looked_up.tensor("self")
        if list(indices) == [0] and _plain(indices[0]) is selection.ids and len(shape(vector)) == 1:
            return inner, vector
    return None


def _normalised(value: Value) -> tuple[Value, dict[str, float | Normalize]] | None:
    """(g, stages) where `value` is g divided by its sum."""
    quotient = made_by(value, "div.Tensor")
    if quotient is None:
        return None
    gates, divisor = _plain(quotient.tensor("self")), _plain(quotient.tensor("other"))
    stages: dict[str, float | Normalize] = {"normalize": Normalize.SUM}
    added = added_number(divisor)
    least = _at_least(divisor)
    if added is not None:
        divisor, stages["norm_eps"] = _plain(added[0]), added[1]
    elif least is not None:
        divisor, stages["norm_min"] = _plain(least[0]), least[1]
    total = made_by(divisor, "sum.dim_IntList", "linalg_vector_norm.default")
    if total is None or not is_last_axis(total) or not total.argument("keepdim"):
        return None
    if total.name == "aten.linalg_vector_norm.default" and total.argument("ord") != 1:
        return None
    return (gates, stages) if _plain(total.operands[0]) is gates else None


def _at_least(value: Value) -> tuple[Value, float] | None:
    """(x, c) where `value` is max(x, c)."""
    clamp = made_by(value, "clamp.default", "clamp_min.default")
    if clamp is not None and clamp.argument("min") is not None:
        if clamp.name == "aten.clamp_min.default" or clamp.argument("max") is None:
            return clamp.tensor("self"), float(clamp.argument("min"))
        return None
    larger = made_by(value, "maximum.default")
    if larger is not None:
        for one, other in both_orders(larger):
            constant = number(other)
            if constant is not None:
                return one, constant
    return None


# -- both together --------------------


def _combine(selection: _Selection, choice: _Choice, weighting: _Weighting) -> RouterReading | None:
    """The reading of choice and weights by one tensor of logits, if they agree on it."""
    routing = replace(choice.stages, **weighting.stages)  # type: ignore[arg-type]
    over, function = _weights_over(selection, choice, weighting)
    by_logit = replace(routing, choice_on=ChoiceOn.LOGIT)
    found: Routing | None = None
    if over is None:
        found = replace(routing, score=choice.score or Score.SOFTMAX, weight_from=WeightFrom.ONE)
        found = found if choice.score is not None else replace(found, choice_on=ChoiceOn.LOGIT)
    elif over is choice.logits and function is Score.SOFTMAX and weighting.function is Score.SOFTMAX:
        found = routing if choice.score is not None else by_logit
        found = replace(found, score=choice.score or Score.SOFTMAX, weight_from=WeightFrom.SOFTMAX_SELECTED)
    elif over is choice.logits and choice.score is None:
        found = replace(by_logit, score=function) if function is not None else replace(routing, score=Score.IDENTITY)
    elif over is choice.logits and function is choice.score and function is not None:
        found = replace(routing, score=function)
    elif over is choice.logits and function is Score.SIGMOID and choice.score is not None:
        found = replace(routing, score=choice.score, weight_from=WeightFrom.SIGMOID_LOGIT)
    if found is None:
        return None
    return RouterReading(choice.logits, found, choice.select_bias, weighting.per_expert_scale)


def _weights_over(selection: _Selection, choice: _Choice, weighting: _Weighting) -> tuple[Value | None, Score | None]:
    """(logits, function) such that gates are function(logits) at the ids; function None is the identity."""
    source = weighting.source
    if source is None:
        return None, None
    if source is _plain(selection.choice) and choice.select_bias is None:
        # The choice values of experts that are chosen: the group limit changes only those that are not.
        source = choice.base
    if weighting.function is not None:
        return source, weighting.function
    if source is choice.base:
        return choice.logits, choice.score
    if source is choice.logits:
        return source, None
    scored = _scored(source)
    return (_plain(scored[1]), scored[0]) if scored is not None else (source, None)


def _plain(value: Value) -> Value:
    """`value` without casts, broadcasts of the last axis and views that only merge or split the token axes."""
    while True:
        op: AtenOp | None = made_by(value, "_to_copy.default")
        if op is not None and tensor(op.operands[0]).dtype.is_float == tensor(value).dtype.is_float:
            value = op.operands[0]
            continue
        op = is_view(value)
        if op is not None and shape(op.operands[0])[-1:] == shape(value)[-1:]:
            value = op.operands[0]
            continue
        op = made_by(value, "expand.default")
        if op is not None and shape(op.operands[0])[-1:] == (1,):
            value = op.operands[0]
            continue
        return value
