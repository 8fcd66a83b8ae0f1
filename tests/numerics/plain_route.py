"""`moe.route` for one token in plain Python: written from the definition of `Routing`, stage by stage, for tests."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moec.dialects.moe import (
    BiasUnit,
    ChoiceOn,
    GroupFill,
    GroupScore,
    Normalize,
    NormOver,
    Routing,
    Score,
    Select,
    WeightFrom,
)

NEVER = -math.inf


@dataclass(frozen=True)
class TokenInputs:
    """One row of every operand."""

    logits: list[float]
    logit_bias: list[float] | None = None
    mask: list[bool] | None = None
    override: list[float] | None = None
    select_bias: list[float] | None = None
    forced_ids: list[int] | None = None
    per_expert_scale: list[float] | None = None


def plain_route(inputs: TokenInputs, routing: Routing) -> list[tuple[int, float]]:
    """(expert, gate) of each valid slot, in order."""
    experts = range(len(inputs.logits))
    z = _logits(inputs, routing)
    s = _scores(z, routing)
    if inputs.override is not None:
        s = inputs.override
        z = [math.log(value) if value > 0 else NEVER for value in s]
    c = list(s if routing.choice_on is ChoiceOn.SCORE else z)
    if inputs.select_bias is not None:
        c = [value + bias for value, bias in zip(c, inputs.select_bias, strict=True)]
    if routing.groups > 1 and 0 < routing.topk_groups < routing.groups:
        c = _limited(c, routing)
    if inputs.mask is not None:
        c = [value if allowed else NEVER for value, allowed in zip(c, inputs.mask, strict=True)]
    chosen = _chosen(c, s, inputs, routing)
    match routing.weight_from:
        case WeightFrom.SCORE:
            gates = {e: s[e] for e in chosen}
        case WeightFrom.SOFTMAX_SELECTED:
            top = max((z[e] for e in chosen), default=0.0)
            total = sum(math.exp(z[e] - top) for e in chosen)
            gates = {e: math.exp(z[e] - top) / total for e in chosen}
        case WeightFrom.SIGMOID_LOGIT:
            gates = {e: _sigmoid(z[e]) for e in chosen}
        case WeightFrom.ONE:
            gates = dict.fromkeys(chosen, 1.0)
    real = [e for e in chosen if e < len(experts) - routing.null_experts]
    if routing.normalize is Normalize.SUM:
        total = sum(gates[e] for e in (chosen if routing.norm_over is NormOver.SELECTED else real))
        total = max(total, routing.norm_min) if routing.norm_min else total + routing.norm_eps
        gates = {e: gate / total if total else gate for e, gate in gates.items()}
    scale = inputs.per_expert_scale or [1.0] * len(experts)
    return [(e, gates[e] * scale[e] * routing.scale + routing.offset) for e in real]


def _logits(inputs: TokenInputs, routing: Routing) -> list[float]:
    z = list(inputs.logits)
    if routing.softcap:
        z = [math.tanh(value / routing.softcap) * routing.softcap for value in z]
    bias = inputs.logit_bias
    if bias is not None and routing.bias_unit is BiasUnit.ABS:
        z = [value + b for value, b in zip(z, bias, strict=True)]
    elif bias is not None and routing.bias_unit is BiasUnit.STD:
        mean = sum(z) / len(z)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in z) / len(z))
        z = [value + b * deviation for value, b in zip(z, bias, strict=True)]
    elif bias is not None:
        top = max(z)
        z = [top + b if b > 0 else value for value, b in zip(z, bias, strict=True)]
    z = [value / routing.temperature for value in z]
    return z if inputs.mask is None else [v if ok else NEVER for v, ok in zip(z, inputs.mask, strict=True)]


def _scores(z: list[float], routing: Routing) -> list[float]:
    match routing.score:
        case Score.SOFTMAX:
            top = max(z)
            powers = [math.exp(value - top) if top > NEVER else 0.0 for value in z]
            return [power / (sum(powers) or 1.0) for power in powers]
        case Score.SIGMOID:
            return [_sigmoid(value) for value in z]
        case Score.RELU:
            return [max(value, 0.0) for value in z]
        case Score.SQRT_SOFTPLUS:
            return [math.sqrt(math.log1p(math.exp(value))) for value in z]
        case Score.IDENTITY:
            return z


def _sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value)) if value > -700 else 0.0


def _best_first(values: list[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda index: (-values[index], index))


def _limited(c: list[float], routing: Routing) -> list[float]:
    size = len(c) // routing.groups
    ratings = []
    for group in range(routing.groups):
        members = sorted(c[group * size : (group + 1) * size], reverse=True)
        ratings.append(members[0] if routing.group_score is GroupScore.MAX else sum(members[:2]))
    kept = _best_first(ratings)[: routing.topk_groups]
    fill = NEVER if routing.group_fill is GroupFill.NEG_INF else 0.0
    return [value if index // size in kept else fill for index, value in enumerate(c)]


def _chosen(c: list[float], s: list[float], inputs: TokenInputs, routing: Routing) -> list[int]:
    experts = len(c)
    allowed = inputs.mask or [True] * experts
    if routing.select is Select.FORCED:
        return [e for e in inputs.forced_ids or [] if e >= 0 and allowed[e]]
    order = _best_first(c)
    if routing.select is Select.TOPK:
        chosen = order[routing.rank_offset : routing.rank_offset + routing.k]
    elif routing.select is Select.PER_GROUP_TOPK:
        size = experts // routing.groups
        members = [
            [e for e in order if e // size == group][: routing.k // routing.groups] for group in range(routing.groups)
        ]
        chosen = [e for e in order if any(e in group for group in members)]
    elif routing.select in (Select.TOPP, Select.ENTROPY):
        chosen, before = [], 0.0
        for rank, e in enumerate(order):
            within = before < routing.p if routing.take_crossing else before + s[e] <= routing.p
            if within or rank < routing.k_min:
                chosen.append(e)
            before += s[e]
        if routing.select is Select.ENTROPY and _entropy(s, routing.entropy_q) > routing.entropy_threshold:
            chosen = order
    elif routing.select is Select.THRESHOLD:
        chosen = [e for e in order if c[e] > routing.p]
    else:
        chosen = order
    if routing.skip_ratio:
        chosen = [e for e in chosen if e == order[0] or s[e] >= routing.skip_ratio * s[order[0]]]
    return [e for e in chosen if allowed[e]][: routing.slots(experts)]


def _entropy(s: list[float], q: float) -> float:
    if q == 1.0:
        return -sum(value * math.log(value) for value in s if value > 0)
    return (1.0 - math.fsum(math.pow(value, q) for value in s)) / (q - 1.0)
