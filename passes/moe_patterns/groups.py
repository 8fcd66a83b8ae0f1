"""The group limit of routers: only experts of the best groups may be chosen."""

from __future__ import annotations

from dataclasses import dataclass

from moec.dialects.aten import AtenOp
from moec.ir import Value
from moec.passes.matching import both_orders, is_last_axis, is_view, made_by, number, shape


@dataclass(frozen=True)
class GroupLimit:
    """`choice` [T, E], of which only the `kept` best of `count` groups stay; a group is rated by the sum of its
    `best` (1 or 2) values, and the others become `fill`."""

    choice: Value
    count: int
    kept: int
    best: int
    fill: float


def read_groups(value: Value) -> GroupLimit | None:
    """The group limit that gives `value`, if it is one."""
    for choice, keep, fill in _filled(value):
        mask = _group_mask(keep)
        if mask is None:
            continue
        scores, kept, count = mask
        rated = _rated(scores)
        if rated is not None and rated[0] is _without_views(choice):
            return GroupLimit(choice, count, kept, rated[1], fill)
    return None


def _filled(value: Value) -> list[tuple[Value, Value, float]]:
    """(choice, keep, fill) for readings of `value` as choice where keep is true (or 1), fill elsewhere."""
    where = made_by(value, "where.self", "where.ScalarSelf", "where.ScalarOther")
    if where is not None:
        condition = where.tensor("condition")
        sides: list[tuple[float | None, Value | None]] = []
        for name in ("self", "other"):
            values = where.tensors(name)
            sides.append((number(values[0]), values[0]) if values else (float(where.argument(name)), None))
        (yes_number, yes), (no_number, no) = sides
        if yes_number is not None and no is not None:
            kept = _inverted(condition)
            return [(no, kept, yes_number)] if kept is not None else []
        return [(yes, condition, no_number)] if no_number is not None and yes is not None else []
    fill = made_by(value, "masked_fill.Scalar")
    if fill is not None:
        kept = _inverted(fill.tensor("mask"))
        return [(fill.tensor("self"), kept, float(fill.argument("value")))] if kept is not None else []
    product = made_by(value, "mul.Tensor")
    return [(one, other, 0.0) for one, other in both_orders(product)] if product is not None else []


def _inverted(condition: Value) -> Value | None:
    op = made_by(condition, "bitwise_not.default", "logical_not.default", "eq.Scalar")
    if op is None or (op.name == "aten.eq.Scalar" and op.argument("other") != 0):
        return None
    return op.tensor("self")


def _group_mask(keep: Value) -> tuple[Value, int, int] | None:
    """(group ratings [T, G], kept groups, G) where `keep` [T, E] marks the experts of the best groups."""
    value = _uncast(keep)
    view = is_view(value)
    expand = made_by(view.operands[0], "expand.default") if view is not None else None
    unsqueeze = made_by(expand.operands[0], "unsqueeze.default") if expand is not None else None
    if unsqueeze is None or expand is None or len(shape(expand.result)) != len(shape(unsqueeze.tensor("self"))) + 1:
        return None
    scatter = made_by(_uncast(unsqueeze.tensor("self")), "scatter.value", "scatter.src")
    if scatter is None or not is_last_axis(scatter):
        return None
    top = made_by(scatter.tensor("index"), "topk.default")
    count = shape(scatter.result)[-1]
    if top is None or not is_last_axis(top) or not top.argument("largest") or not isinstance(count, int):
        return None
    return top.tensor("self"), int(top.argument("k")), count


def _rated(scores: Value) -> tuple[Value, int] | None:
    """(choice, how many values count) where `scores` [T, G] rates groups of choice values."""
    total = made_by(scores, "sum.dim_IntList")
    if total is not None and is_last_axis(total) and not total.argument("keepdim"):
        top = made_by(total.operands[0], "topk.default")
        if (
            top is not None
            and is_last_axis(top)
            and total.operands[0] is top.results[0]
            and top.argument("k") in (1, 2)
        ):
            return _without_views(top.tensor("self")), int(top.argument("k"))
    best: AtenOp | None = made_by(scores, "max.dim", "amax.default")
    if best is not None and scores is best.results[0] and is_last_axis(best) and not best.argument("keepdim"):
        return _without_views(best.tensor("self")), 1
    return None


def _uncast(value: Value) -> Value:
    while (op := made_by(value, "_to_copy.default")) is not None:
        value = op.operands[0]
    return value


def _without_views(value: Value) -> Value:
    while (op := is_view(value)) is not None:
        value = op.operands[0]
    return value
