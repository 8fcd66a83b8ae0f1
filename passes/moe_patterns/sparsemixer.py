"""The router of PhiMoE (arXiv 2409.12136): two rounds of choosing the best expert among those near it."""

from __future__ import annotations

import math

from moec.dialects.aten import AtenOp
from moec.ir import Value
from moec.passes.matching import is_last_axis, made_by, number


def read_sparsemixer(ids: Value, gates: Value) -> tuple[Value, float] | None:
    """(logits, jitter) where `ids` and `gates` are those of two rounds over the logits."""
    both_ids, both_gates = made_by(ids, "cat.default"), made_by(gates, "cat.default")
    if both_ids is None or both_gates is None or not is_last_axis(both_ids) or not is_last_axis(both_gates):
        return None
    if len(both_ids.operands) != 2 or len(both_gates.operands) != 2:
        return None
    first, second = (_best(value) for value in both_ids.operands)
    if first is None or second is None:
        return None
    logits, remaining = first[0], made_by(second[0], "scatter.value")
    if remaining is None or remaining.tensor("self") is not logits or remaining.argument("value") != -math.inf:
        return None
    if remaining.tensor("index") is not both_ids.operands[0]:
        return None
    rounds = (
        (both_gates.operands[0], both_ids.operands[0], logits, first[1]),
        (both_gates.operands[1], both_ids.operands[1], remaining.result, second[1]),
    )
    jitters = {_jitter(*one, logits) for one in rounds}
    found = jitters.pop()
    return (logits, found) if not jitters and found is not None else None


def _best(ids: Value) -> tuple[Value, Value] | None:
    """(x, the largest of x) where `ids` are the indices of the largest entries of x."""
    best = made_by(ids, "max.dim", "topk.default")
    if best is None or ids is not best.results[1] or not is_last_axis(best):
        return None
    single = best.argument("k") == 1 if best.name == "aten.topk.default" else best.argument("keepdim")
    return (best.tensor("self"), best.results[0]) if single else None


def _jitter(gate: Value, index: Value, candidates: Value, largest: Value, logits: Value) -> float | None:
    """The jitter of one round: softmax of the candidates without those for which
    (largest - logit) / max(|logit|, largest) > 2 * jitter, at `index`."""
    gather = made_by(gate, "gather.default")
    softmax = made_by(gather.tensor("self"), "softmax.int") if gather is not None else None
    if gather is None or softmax is None or gather.tensor("index") is not index or not is_last_axis(softmax):
        return None
    masked = softmax.tensor("self")
    where = made_by(masked, "where.self", "masked_fill.Scalar")
    if where is None:
        return None
    fill, kept = _where_parts(where)
    far = made_by(where.tensor("condition" if where.name == "aten.where.self" else "mask"), "gt.Scalar")
    if fill != -math.inf or kept is not candidates or far is None:
        return None
    ratio = made_by(far.tensor("self"), "div.Tensor")
    difference = made_by(ratio.tensor("self"), "sub.Tensor") if ratio is not None else None
    factor = (
        made_by(ratio.tensor("other"), "clamp.Tensor", "clamp_min.Tensor", "maximum.default")
        if ratio is not None
        else None
    )
    if difference is None or factor is None:
        return None
    size = made_by(factor.tensor("self"), "abs.default")
    least = factor.tensor("other" if factor.name == "aten.maximum.default" else "min")
    fits = difference.tensor("self") is largest and difference.tensor("other") is logits and least is largest
    if not fits or size is None or size.tensor("self") is not logits:
        return None
    return float(far.argument("other")) / 2


def _where_parts(op: AtenOp) -> tuple[float | None, Value]:
    """(what masked entries become, the others)."""
    if op.name == "aten.where.self":
        return number(op.tensor("self")), op.tensor("other")
    return float(op.argument("value")), op.tensor("self")
