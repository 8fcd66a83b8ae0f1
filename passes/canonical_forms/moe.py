"""Canonical forms of routing.

Two routings are the same only if they choose the same experts with the same gates for all logits in exact arithmetic.
What is not exact stays as it is: dropping a renormalisation, or exchanging the fill of groups.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moec.dialects.moe import (
    ChoiceOn,
    GroupFill,
    GroupScore,
    Normalize,
    RouteOp,
    Routing,
    Score,
    Select,
    WeightFrom,
)
from moec.rewrite.pattern import Rewriter, rewrite

# Every token gets at least one expert, so that the sum of its gates is not zero.
_NEVER_EMPTY = frozenset({Select.TOPK, Select.PER_GROUP_TOPK, Select.TOPP, Select.ENTROPY, Select.ALL})
# Strictly increasing in the logit, so that both order the experts in the same way. `relu` makes ties.
_MONOTONE = frozenset({Score.SOFTMAX, Score.SIGMOID, Score.SQRT_SOFTPLUS, Score.IDENTITY})
_DEFAULTS = Routing()


def _set(op: RouteOp, rewriter: Rewriter, routing: Routing) -> bool:
    if routing == op.routing:
        return False
    op.routing = routing
    rewriter.notify(op)
    return True


def _what_reads_values(op: RouteOp) -> str:
    """What makes the values that the choice is made on matter, and not only their order; empty if nothing does."""
    routing = op.routing
    if routing.select not in _NEVER_EMPTY:
        return f"{routing.select.value} selection reads the score itself"
    if op.select_bias is not None:
        return "select_bias is added to the score"
    if op.score_override is not None:
        return "some rows of scores come from an operand"
    if routing.limits_groups and routing.group_score is not GroupScore.MAX:
        return "groups are rated by a sum of scores"
    if routing.limits_groups and routing.group_fill is not GroupFill.NEG_INF:
        return "experts outside the groups compete with the score 0"
    return ""


def _leaves_out(op: RouteOp) -> bool:
    """Whether an expert may have score 0, or no chance to be chosen."""
    return op.mask is not None or op.score_override is not None or op.routing.limits_groups


@rewrite(RouteOp)
def select_all(op: RouteOp, rewriter: Rewriter) -> bool:
    """topk of all experts, topp with p >= 1 ==> all, or topk; per_group_topk of one group ==> topk"""
    routing = op.routing
    experts = op.experts
    if routing.select is Select.PER_GROUP_TOPK and routing.groups == 1:
        routing = replace(routing, select=Select.TOPK)
    every = routing.select is Select.TOPP and routing.p >= 1 and routing.take_crossing
    if every and not routing.skip_ratio and not _leaves_out(op):
        # in exact arithmetic the scores before an expert never sum up to 1, as its own is not zero; those up to the
        # last do, and may come out above. Experts that are skipped make room in topp, and none among the best k
        routing = replace(routing, select=Select.TOPK, k=routing.slots(experts), p=0.0, k_min=1, k_max=0)
    whole = routing.k == experts and not routing.rank_offset and not routing.limits_groups
    if routing.select is Select.TOPK and whole and routing.k_max in (0, experts):
        routing = replace(routing, select=Select.ALL, k=0, k_max=0)
    return _set(op, rewriter, routing)


@rewrite(RouteOp)
def reset_idle_stages(op: RouteOp, rewriter: Rewriter) -> bool:
    """options of stages that do nothing ==> their defaults"""
    routing = op.routing
    idle: list[str] = []
    if not routing.limits_groups:
        idle += ["topk_groups", "group_score", "group_fill"]
        if routing.select is not Select.PER_GROUP_TOPK:
            idle.append("groups")
    if op.logit_bias is None:
        idle.append("bias_unit")
    if routing.normalize is Normalize.NONE:
        idle += ["norm_over", "norm_eps", "norm_min"]
    if routing.select not in (Select.TOPP, Select.ENTROPY):
        idle += ["k_min", "take_crossing"]
    if routing.select not in (Select.TOPP, Select.ENTROPY, Select.THRESHOLD):
        idle.append("p")
    if routing.select is not Select.ENTROPY:
        idle += ["entropy_q", "entropy_threshold"]
    if routing.select is not Select.SPARSEMIXER:
        idle.append("jitter_eps")
    if routing.k_max and routing.k_max == replace(routing, k_max=0).slots(op.experts):
        idle.append("k_max")
    defaults: dict[str, Any] = {name: getattr(_DEFAULTS, name) for name in idle}
    return _set(op, rewriter, replace(routing, **defaults))


@rewrite(RouteOp)
def softmax_over_selected(op: RouteOp, rewriter: Rewriter) -> bool:
    """softmax over all, selected, divided by their sum ==> softmax over the selected"""
    routing = op.routing
    if routing.score is not Score.SOFTMAX or routing.weight_from is not WeightFrom.SCORE:
        return False
    if routing.normalize is not Normalize.SUM or routing.select not in _NEVER_EMPTY:
        return False
    if routing.norm_eps or routing.norm_min:
        return rewriter.refuse(op, "the sum is not the plain sum of the selected scores")
    if routing.norm_over is not _DEFAULTS.norm_over:
        return rewriter.refuse(op, "the sum leaves out null experts")
    if op.score_override is not None:
        return rewriter.refuse(op, "some rows of scores come from an operand")
    return _set(op, rewriter, replace(routing, weight_from=WeightFrom.SOFTMAX_SELECTED, normalize=Normalize.NONE))


@rewrite(RouteOp)
def choose_on_logits(op: RouteOp, rewriter: Rewriter) -> bool:
    """choice on a monotone score, unbiased ==> choice on the logit"""
    routing = op.routing
    if routing.choice_on is ChoiceOn.LOGIT or routing.score not in _MONOTONE:
        return False
    reason = _what_reads_values(op)
    if reason:
        return rewriter.refuse(op, reason)
    return _set(op, rewriter, replace(routing, choice_on=ChoiceOn.LOGIT))


PATTERNS = (select_all, reset_idle_stages, softmax_over_selected, choose_on_logits)
