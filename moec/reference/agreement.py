"""Whether two runs route tokens to the same experts, and whether a difference is a tie."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment

from moec.dialects.moe import GroupScore, RouteOp, Routing, Select
from moec.reference.frame import Observation
from moec.reference.route import RouteInputs, Scores, route_inputs, score

TIE_ULPS = 64
"""Two choice values closer than this many units in the last place of the largest one are a tie."""


@dataclass(frozen=True)
class RouteRecord:
    """What one `moe.route` did: selection ids i64 [T, K] of which the first count [T] are valid, from `scores`.

    `margin` [T] is how much choice values must move before the selection changes, relative to the largest one.
    """

    op: RouteOp
    scores: Scores
    ids: torch.Tensor
    count: torch.Tensor
    margin: torch.Tensor

    @property
    def experts(self) -> int:
        """Router outputs."""
        return self.scores.choice.shape[1]

    def selected(self) -> torch.Tensor:
        """Boolean [T, E]."""
        valid = torch.arange(self.ids.shape[1]) < self.count[:, None]
        chosen = torch.zeros(self.scores.choice.shape, dtype=torch.int64)
        return chosen.scatter_add(1, self.ids, valid.to(torch.int64)) > 0


def record_route(observation: Observation) -> RouteRecord:
    """The record of an observed `moe.route`."""
    op = observation.op
    assert isinstance(op, RouteOp)
    inputs = route_inputs(op, observation.frame)
    ids, _, count = observation.results
    return RouteRecord(op, score(inputs, op.routing), ids, count, routing_margin(inputs, op.routing))


def routing_margin(inputs: RouteInputs, routing: Routing) -> torch.Tensor:
    """[T]: the smallest gap that decides a token's selection, divided by its largest finite choice value.

    For top-k it is the gap between the last expert taken and the first one not taken, and between groups where they
    are limited. Selections without such a boundary (all, forced) give infinity; other selections use the smallest gap
    between neighbours in rank, which is a lower bound.
    """
    if routing.select in (Select.ALL, Select.FORCED):
        return torch.full(inputs.logits.shape[:1], torch.inf)
    choice = score(inputs, routing).choice
    if routing.select is Select.SPARSEMIXER:
        choice = score(inputs, replace(routing, select=Select.ALL)).logits.detach()
    ranked = torch.sort(choice, dim=-1, descending=True).values
    gaps = (ranked[:, :-1] - ranked[:, 1:]).nan_to_num(torch.inf, posinf=torch.inf)
    first, last = routing.rank_offset, routing.rank_offset + routing.k
    if routing.select in (Select.TOPK, Select.SPARSEMIXER):
        gaps = gaps[:, [at - 1 for at in (first, last) if 0 < at <= gaps.shape[1]]]
    margin = gaps.amin(1) if gaps.shape[1] else torch.full(choice.shape[:1], torch.inf, dtype=choice.dtype)
    largest = choice.masked_fill(~choice.isfinite(), 0.0).abs().amax(1)
    if routing.limits_groups:
        ungrouped = score(inputs, replace(routing, topk_groups=0)).choice.reshape(len(choice), routing.groups, -1)
        best = 1 if routing.group_score is GroupScore.MAX else min(2, ungrouped.shape[2])
        ratings = torch.sort(ungrouped.topk(best, dim=-1).values.sum(-1), dim=-1, descending=True).values
        gap = ratings[:, routing.topk_groups - 1] - ratings[:, routing.topk_groups]
        margin = torch.minimum(margin, gap)
        largest = torch.maximum(largest, ratings.masked_fill(~ratings.isfinite(), 0.0).abs().amax(1))
    return margin / torch.where(largest == 0, 1.0, largest)


@dataclass(frozen=True)
class RouteAgreement:
    """Tokens [T] that two routes treat alike, differently, and differently because of a tie."""

    same: torch.Tensor
    ties: torch.Tensor

    @property
    def differences(self) -> int:
        """Tokens that go to other experts although there was no tie."""
        return int((~self.same & ~self.ties).sum())


def compare_routes(
    before: RouteRecord, after: RouteRecord, relabelled: torch.Tensor, tolerance: float
) -> RouteAgreement:
    """Compares selections; the router output e of `before` is `relabelled[e]` of `after`.

    `tolerance`: a difference where the margin of either side is at most this is a tie.
    """
    same = (before.selected() == after.selected()[:, relabelled]).all(1)
    ties = ~same & ((before.margin <= tolerance) | (after.margin <= tolerance))
    return RouteAgreement(same, ties)


def tie_tolerance(dtype: torch.dtype) -> float:
    """The margin below which rounding in `dtype` may decide."""
    return TIE_ULPS * torch.finfo(dtype).eps


def relabelling(before: RouteRecord, after: RouteRecord) -> torch.Tensor:
    """For each router output of `before` the one of `after` that ranks tokens the same way, i64 [E].

    Only the order of the experts of each token counts, so that it survives every monotone change of scores. Equal
    candidates keep their number. Both must have the same number of router outputs.
    """
    identity = torch.arange(before.experts)
    old, new = _ranks(before.scores.choice), _ranks(after.scores.choice)
    if torch.equal(old, new):
        return identity
    distance = torch.cdist(old.T, new.T, p=1) + 0.5 * (identity[:, None] != identity)
    rows, columns = linear_sum_assignment(distance.numpy())
    result = torch.empty_like(identity)
    result[torch.as_tensor(rows)] = torch.as_tensor(columns)
    return result


def _ranks(choice: torch.Tensor) -> torch.Tensor:
    order = torch.sort(choice, dim=1, descending=True, stable=True).indices
    return order.argsort(1).to(torch.float64)
