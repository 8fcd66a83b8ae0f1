"""`moe.route` on torch: the 13 stages of `Routing`, in their order."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moec.dialects.moe import (
    BiasUnit,
    ChoiceOn,
    GroupFill,
    GroupScore,
    Normalize,
    NormOver,
    RouteOp,
    Routing,
    Score,
    Select,
    WeightFrom,
)
from moec.reference.frame import Frame
from moec.reference.kernels import Kernel, prepares

_NEVER = -torch.inf
# How far the logit of an expert that a token is steered to lies above the others: its softmax gate is then large.
_STEERED_LEAD = 4.0


@dataclass(frozen=True)
class RouteInputs:
    """The operands of `moe.route`; shapes as in `RouteOp`. `steering` as in `frame.Steering`."""

    logits: torch.Tensor
    logit_bias: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    score_override: torch.Tensor | None = None
    override_on: torch.Tensor | None = None
    select_bias: torch.Tensor | None = None
    forced_ids: torch.Tensor | None = None
    per_expert_scale: torch.Tensor | None = None
    steering: torch.Tensor | None = None


@dataclass(frozen=True)
class Scores:
    """Stages 1 to 8 for each token and expert, all [T, E]: logits, scores, and values that the choice is made on."""

    logits: torch.Tensor
    scores: torch.Tensor
    choice: torch.Tensor


@prepares(RouteOp)
def prepare_route(op: RouteOp) -> Kernel:
    """ids, gates and count."""

    def compute(frame: Frame) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs = route_inputs(op, frame)
        steering = frame.settings.steering
        if steering is not None:
            inputs = replace(inputs, steering=steering(op, score(inputs, op.routing).choice))
        return route(inputs, op.routing)

    return compute


def route_inputs(op: RouteOp, frame: Frame) -> RouteInputs:
    """The operands of one operation as tensors."""
    return RouteInputs(
        frame.tensor(op.logits),
        frame.optional(op.logit_bias),
        frame.optional(op.mask),
        frame.optional(op.score_override),
        frame.optional(op.override_on),
        frame.optional(op.select_bias),
        frame.optional(op.forced_ids),
        frame.optional(op.per_expert_scale),
    )


def route(inputs: RouteInputs, routing: Routing) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids i64 [T, K], gates [T, K], count i64 [T]), gates in float32, or in float64 for float64 logits.

    Gates are differentiable with respect to logits, scores, scales and, where gates depend on them, biases.
    """
    experts = inputs.logits.shape[1]
    if routing.select is Select.SPARSEMIXER:
        ids, gates, chosen = _sparsemixer(_adjusted_logits(inputs, routing), routing)
        valid = torch.ones_like(chosen)
    else:
        scored = score(inputs, routing)
        ids, valid = _select(scored, inputs, routing)
        gates = _gates(scored, ids, valid, routing)
    kept = valid & (ids < experts - routing.null_experts)
    if routing.normalize is Normalize.SUM:
        over = valid if routing.norm_over is NormOver.SELECTED else kept
        gates = _normalised(gates, over, routing)
    # Null experts leave holes, which move behind the valid slots.
    order = torch.sort((~kept).to(torch.uint8), dim=1, stable=True).indices
    ids, gates, kept = ids.gather(1, order), gates.gather(1, order), kept.gather(1, order)
    if inputs.per_expert_scale is not None:
        gates = gates * inputs.per_expert_scale.to(gates.dtype)[ids]
    gates = torch.where(kept, gates * routing.scale + routing.offset, 0.0)
    return torch.where(kept, ids, 0), gates, kept.sum(1)


def score(inputs: RouteInputs, routing: Routing) -> Scores:
    """Stages 1 to 8."""
    z = _adjusted_logits(inputs, routing)
    match routing.score:
        case Score.SOFTMAX:
            # a row that is masked everywhere has no scores, instead of NaN
            s = torch.softmax(z, dim=-1).masked_fill((z == _NEVER).all(-1, keepdim=True), 0.0)
        case Score.SIGMOID:
            s = torch.sigmoid(z)
        case Score.RELU:
            s = torch.relu(z)
        case Score.SQRT_SOFTPLUS:
            s = torch.nn.functional.softplus(z).sqrt()
        case Score.IDENTITY:
            s = z
    if inputs.score_override is not None and inputs.override_on is not None:
        on = inputs.override_on.to(torch.bool)[:, None]
        given = inputs.score_override.to(s.dtype)
        s = torch.where(on, given, s)
        z = torch.where(on, given.log(), z)
    choice = (s if routing.choice_on is ChoiceOn.SCORE else z).detach()
    if inputs.select_bias is not None:
        choice = choice + inputs.select_bias.detach().to(choice.dtype)
    if inputs.steering is not None:
        choice = choice.masked_fill(_steered(inputs.steering, choice), torch.inf)
    if routing.limits_groups:
        choice = _limit_groups(choice, routing)
    if inputs.mask is not None:
        choice = choice.masked_fill(~inputs.mask.to(torch.bool), _NEVER)
    return Scores(z, s, choice)


def _adjusted_logits(inputs: RouteInputs, routing: Routing) -> torch.Tensor:
    """Stages 1 to 4, [T, E]. The standard deviation of a row is that of its E numbers (divisor E)."""
    z = inputs.logits if inputs.logits.dtype == torch.float64 else inputs.logits.float()
    if routing.softcap:
        z = torch.tanh(z / routing.softcap) * routing.softcap
    if inputs.logit_bias is not None:
        bias = inputs.logit_bias.to(z.dtype).expand_as(z)
        match routing.bias_unit:
            case BiasUnit.ABS:
                z = z + bias
            case BiasUnit.STD:
                z = z + bias * z.std(dim=-1, correction=0, keepdim=True)
            case BiasUnit.MAX:
                z = torch.where(bias > 0, z.amax(-1, keepdim=True) + bias, z)
    z = z / routing.temperature
    if inputs.steering is not None:
        z = torch.where(_steered(inputs.steering, z), z.amax(-1, keepdim=True) + _STEERED_LEAD, z)
    return z if inputs.mask is None else z.masked_fill(~inputs.mask.to(torch.bool), _NEVER)


def _steered(steering: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return steering[:, None] == torch.arange(values.shape[1])


def _limit_groups(choice: torch.Tensor, routing: Routing) -> torch.Tensor:
    grouped = choice.reshape(len(choice), routing.groups, -1)
    best = 1 if routing.group_score is GroupScore.MAX else min(2, grouped.shape[2])
    ratings = grouped.topk(best, dim=-1).values.sum(-1)
    kept = _ranks(ratings) < routing.topk_groups
    fill = _NEVER if routing.group_fill is GroupFill.NEG_INF else 0.0
    return grouped.masked_fill(~kept[:, :, None], fill).reshape(choice.shape)


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """The position of each element of the last dimension in descending order, equal ones by their index."""
    return _descending(values).argsort(dim=-1)


def _descending(values: torch.Tensor) -> torch.Tensor:
    return torch.sort(values, dim=-1, descending=True, stable=True).indices


def _select(scored: Scores, inputs: RouteInputs, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Stage 9: (ids [T, K], which slots are valid [T, K]), valid slots first, by descending choice."""
    if routing.select is Select.FORCED:
        return _forced(inputs)
    choice = scored.choice
    tokens, experts = choice.shape
    order = _descending(choice)
    ranked = scored.scores.detach().gather(1, order)
    position = torch.arange(experts).expand(tokens, experts)
    match routing.select:
        case Select.TOPK:
            chosen = (position >= routing.rank_offset) & (position < routing.rank_offset + routing.k)
        case Select.PER_GROUP_TOPK:
            grouped = choice.reshape(tokens, routing.groups, -1)
            chosen = (_ranks(grouped) < routing.k // routing.groups).reshape(choice.shape).gather(1, order)
        case Select.TOPP | Select.ENTROPY:
            reached = ranked.cumsum(-1)
            within = reached - ranked < routing.p if routing.take_crossing else reached <= routing.p
            chosen = within | (position < routing.k_min)
            if routing.select is Select.ENTROPY:
                uncertain = _entropy(scored.scores.detach(), routing.entropy_q) > routing.entropy_threshold
                chosen = chosen | uncertain[:, None]
        case Select.THRESHOLD:
            chosen = choice.gather(1, order) > routing.p
        case _:
            chosen = torch.ones(tokens, experts, dtype=torch.bool)
    if routing.skip_ratio:
        chosen = chosen & ((position == 0) | (ranked >= routing.skip_ratio * ranked[:, :1]))
    if inputs.mask is not None:
        chosen = chosen & inputs.mask.to(torch.bool).expand(tokens, experts).gather(1, order)
    # chosen ranks first, still in descending order
    front = torch.sort((~chosen).to(torch.uint8), dim=1, stable=True).indices[:, : routing.slots(experts)]
    return order.gather(1, front), chosen.gather(1, front)


def _forced(inputs: RouteInputs) -> tuple[torch.Tensor, torch.Tensor]:
    assert inputs.forced_ids is not None
    given = inputs.forced_ids.to(torch.int64)
    valid = given >= 0
    ids = given.clamp_min(0)
    if inputs.mask is not None:
        valid = valid & inputs.mask.to(torch.bool).expand_as(inputs.logits).gather(1, ids)
    front = torch.sort((~valid).to(torch.uint8), dim=1, stable=True).indices
    return ids.gather(1, front), valid.gather(1, front)


def _entropy(scores: torch.Tensor, q: float) -> torch.Tensor:
    """Tsallis entropy of order q of each row (Shannon for q = 1), in nats."""
    if abs(q - 1.0) < 1e-6:
        shannon: torch.Tensor = -torch.special.xlogy(scores, scores).sum(-1)
        return shannon
    tsallis: torch.Tensor = (1.0 - scores.pow(q).sum(-1)) / (q - 1.0)
    return tsallis


def _gates(scored: Scores, ids: torch.Tensor, valid: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Stage 10, [T, K]; 0 where a slot is not valid."""
    match routing.weight_from:
        case WeightFrom.SCORE:
            gates = scored.scores.gather(1, ids)
        case WeightFrom.SOFTMAX_SELECTED:
            selected = scored.logits.gather(1, ids).masked_fill(~valid, _NEVER)
            gates = torch.softmax(selected.masked_fill(~valid.any(1, keepdim=True), 0.0), dim=-1)
        case WeightFrom.SIGMOID_LOGIT:
            gates = torch.sigmoid(scored.logits.gather(1, ids))
        case WeightFrom.ONE:
            gates = torch.ones_like(scored.scores[:, :1]).expand(ids.shape)
    return torch.where(valid, gates, 0.0)


def _normalised(gates: torch.Tensor, over: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Stage 12. A row whose gates are all zero stays zero."""
    total = torch.where(over, gates, 0.0).sum(-1, keepdim=True)
    total = total.clamp_min(routing.norm_min) if routing.norm_min else total + routing.norm_eps
    return gates / torch.where(total == 0, 1.0, total)


def _sparsemixer(logits: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Top-2 of PhiMoE (arXiv 2409.12136) in evaluation mode: (ids, gates, true), each [T, 2].

    Each gate is a softmax over the experts whose logit is within a factor of the best remaining one.
    """
    ids, gates = [], []
    remaining = logits
    for _ in range(2):
        best = _descending(remaining.detach())[:, :1]
        top = remaining.gather(1, best).detach()
        factor = logits.detach().abs().clamp_min(top)
        far = (top - logits.detach()) / factor > 2 * routing.jitter_eps
        near = remaining.masked_fill(far, _NEVER)
        gates.append(torch.softmax(near, dim=-1).gather(1, best))
        ids.append(best)
        remaining = remaining.scatter(1, best, _NEVER)
    chosen = torch.cat(ids, dim=1)
    return chosen, torch.cat(gates, dim=1), torch.ones_like(chosen, dtype=torch.bool)
