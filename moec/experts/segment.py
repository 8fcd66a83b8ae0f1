"""Finer experts: each stored expert becomes several, and each router output as many copies (DeepSeekMoE)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from moec.dialects.moe import (
    BiasUnit,
    ChoiceOn,
    ExpertClass,
    ExpertsOp,
    GroupScore,
    Normalize,
    RouteOp,
    Routing,
    Score,
    Select,
    WeightFrom,
)
from moec.experts.bodies import build_body
from moec.experts.edit import EditError, cut_router, replace_experts
from moec.experts.expert import Constant, Expert
from moec.experts.layer import MoeLayer
from moec.experts.parts import erase_unused, new_weight, store_tensor
from moec.experts.reading import load_expert
from moec.weights.context import WeightContext


def segment_experts(
    layer: MoeLayer, weights: WeightContext, parts: int, split: Callable[[int, Expert], Sequence[Expert]]
) -> MoeLayer:
    """Puts the `parts` experts that `split` makes of a stored expert and its number in its place, one after the other.

    Every row of the router is repeated for each part, and a token chooses all parts of what it chose; scales make up
    for scores that are shared among copies. So the layer computes what it did where parts add up to their expert: equal
    logits choose by the lower index, which keeps the parts of one expert together. One expert is in memory at a time.
    Raises EditError where `segmenting_problem` says why, UsageError where there is no store.
    """
    problem = segmenting_problem(layer.route)
    if problem:
        raise EditError(f"the experts of this layer cannot become finer: {problem}", where=layer.name)
    rows = [output for output in range(layer.outputs) for _ in range(parts)]
    stored = tuple(expert * parts + part if expert >= 0 else -1 for expert in layer.stored for part in range(parts))
    router, route = cut_router(layer, rows, finer_routing(layer.route.routing, parts))
    count = layer.expert_count * parts
    old = layer.experts
    zeros = new_weight(layer, f"{layer.name}.zeros", store_tensor(weights, torch.zeros(count, 1)), (count, 1))
    # experts that give nothing, until the edit below puts the real ones in their place
    nothing = ExpertsOp(
        old.x,
        route.ids,
        route.gates,
        [zeros],
        regions=[build_body(Constant(torch.zeros(1)), layer.hidden_size)],
        stored=stored,
        classes=(ExpertClass(tuple(range(count)), 1),),
        protected=tuple(expert * parts + part for expert in old.protected for part in range(parts)),
        location=old.location,
    )
    nothing.insert_before(old)
    old.y.replace_all_uses_with(nothing.y)
    made = replace(layer, route=route, experts=nothing, router=router)
    made = replace_experts(made, weights, _Parts(layer, weights, parts, split))
    erase_unused(old)
    erase_unused(layer.route)
    return made


def segmenting_problem(route: RouteOp) -> str:
    """Why router outputs cannot be repeated without a change of what is chosen; empty where they can."""
    routing: Routing = route.routing
    if routing.select in (Select.TOPP, Select.ENTROPY, Select.FORCED, Select.SPARSEMIXER):
        return f"its router selects by {routing.select.value}, which may take some parts of an expert alone"
    if routing.skip_ratio and routing.score is Score.IDENTITY:
        return "its router skips experts far below the best score, which may be negative, and so parts of the best one"
    if routing.limits_groups and routing.group_score is GroupScore.SUM_TOP2:
        return "its router rates groups by their two best experts"
    if route.logit_bias is not None and routing.bias_unit is not BiasUnit.ABS:
        return "its router adds a bias that depends on all logits"
    if route.select_bias is not None and routing.score is Score.SOFTMAX and routing.choice_on is ChoiceOn.SCORE:
        return "its router adds a bias to scores that more outputs would lower"
    if route.score_override is not None or route.forced_ids is not None:
        return "some of its choices are forced"
    return ""


def finer_routing(routing: Routing, parts: int) -> Routing:
    """The stages that choose and weigh `parts` copies of each output as they did the output itself.

    Copies share what a softmax gives, and count in sums of gates; either is made up for.
    """
    softmax = routing.score is Score.SOFTMAX
    from_softmax = (
        routing.weight_from is WeightFrom.SCORE and softmax
    ) or routing.weight_from is WeightFrom.SOFTMAX_SELECTED
    summed = routing.normalize is Normalize.SUM
    finer = replace(
        routing,
        k=routing.k * parts,
        k_max=routing.k_max * parts,
        rank_offset=routing.rank_offset * parts,
        null_experts=routing.null_experts * parts,
        scale=routing.scale * (parts if from_softmax or summed else 1),
    )
    if summed and not from_softmax:
        finer = replace(finer, norm_eps=routing.norm_eps * parts, norm_min=routing.norm_min * parts)
    if routing.select is Select.THRESHOLD and softmax and routing.choice_on is ChoiceOn.SCORE:
        finer = replace(finer, p=routing.p / parts)
    return finer


class _Parts(Mapping[int, Expert]):
    """The parts of all stored experts, which are loaded one expert at a time."""

    def __init__(
        self,
        layer: MoeLayer,
        weights: WeightContext,
        parts: int,
        split: Callable[[int, Expert], Sequence[Expert]],
    ) -> None:
        self._layer = layer
        self._weights = weights
        self._parts = parts
        self._split = split
        self._known: tuple[int, Sequence[Expert]] = (-1, ())

    def __len__(self) -> int:
        return self._layer.expert_count * self._parts

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __getitem__(self, number: int) -> Expert:
        expert, part = divmod(number, self._parts)
        if self._known[0] != expert:
            self._known = (expert, self._split(expert, load_expert(self._layer, self._weights, expert)))
        return self._known[1][part]
