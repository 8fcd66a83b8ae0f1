"""raise-moe on router arithmetic as models write it: what it is read as, and that wrong readings are found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional

from moec.dialects.moe import (
    ChoiceOn,
    ExpertsOp,
    GroupFill,
    GroupScore,
    Normalize,
    Routing,
    Score,
    Select,
    WeightFrom,
)
from moec.frontend.expert_body import trace_expert
from moec.frontend.torch_export import load_torch
from moec.module import Module
from moec.passes.moe_patterns import RouterCheck, RouterReading, read_router
from tests.passes.raising import Raised, Several, raise_all

WIDTH, EXPERTS, TOP = 16, 8, 3
HIDDEN = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))

Router = Callable[["Block", torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@cache
def expert_body() -> str:
    stacks = [("up", torch.Size([24, WIDTH])), ("down", torch.Size([WIDTH, 24]))]
    return trace_expert(lambda x, up, down: torch.relu(x @ up.T) @ down.T, stacks, WIDTH, "test").digest


class Block(nn.Module):
    """Tokens through a router and the experts that it gives: `router(block, logits)` gives ids and gates."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)

        def normal(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*sizes, generator=generator))

        self.router = router
        self.gate, self.up, self.down = normal(EXPERTS, WIDTH), normal(EXPERTS, 24, WIDTH), normal(EXPERTS, WIDTH, 24)
        self.bias, self.scale, self.temper = normal(EXPERTS), normal(EXPERTS), normal(1)
        self.body = expert_body()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, WIDTH)
        ids, gates = self.router(self, tokens @ self.gate.T)
        result = torch.ops.moec.experts(tokens, ids, gates, [self.up, self.down], self.body)
        return result.view(x.shape)


def picked(scores: torch.Tensor, choice: torch.Tensor, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.topk(choice, TOP, dim=-1, **options).indices
    return ids, scores.gather(1, ids)


def renormalised(chosen: tuple[torch.Tensor, torch.Tensor], epsilon: float | None = None):
    ids, gates = chosen
    total = gates.sum(-1, keepdim=True)
    return ids, gates / (total if epsilon is None else total + epsilon)


def in_groups(choice: torch.Tensor, best: int, kept: int, fill: float) -> torch.Tensor:
    """Four groups of two experts."""
    grouped = choice.view(-1, 4, EXPERTS // 4)
    ratings = grouped.max(-1).values if best == 1 else grouped.topk(2, -1).values.sum(-1)
    marked = torch.zeros_like(ratings).scatter(1, torch.topk(ratings, kept, -1, sorted=False).indices, 1)
    mask = marked.unsqueeze(-1).expand(-1, 4, EXPERTS // 4).reshape(-1, EXPERTS)
    return choice.masked_fill(~mask.bool(), fill)


def softmax_first(m, z):
    gates, ids = torch.topk(torch.softmax(z, -1), TOP, -1)
    return ids, gates


def softmax_last(m, z):
    values, ids = torch.topk(z, TOP, -1)
    return ids, torch.softmax(values, 1, dtype=torch.float)


def softmax_over_gathered(m, z):
    ids, values = picked(z, z)
    return ids, values.softmax(-1)


def sorted_first(m, z):
    scores = z.softmax(-1)
    ids = torch.argsort(scores, dim=-1, descending=True)[:, :TOP]
    return ids, scores.gather(1, ids)


def deepseek_v2(m, z):
    scores = z.softmax(-1)
    gates, ids = torch.topk(in_groups(scores, 1, 2, 0.0), TOP, -1, sorted=False)
    return ids, gates * 1.5


def deepseek_v3(m, z):
    scores = z.sigmoid()
    ids, gates = renormalised(picked(scores, in_groups(scores + m.bias, 2, 2, float("-inf")), sorted=False), 1e-20)
    return ids, gates * 2.5


def deepseek_v3_zero_filled(m, z):
    scores = z.sigmoid()
    return renormalised(picked(scores, in_groups(scores + m.bias.abs(), 2, 2, 0.0)), 1e-20)


def one_group(m, z):
    scores = z.sigmoid()
    return picked(scores, scores + m.bias.unsqueeze(0))


def least_sum(m, z):
    scores = z.softmax(-1)
    ids, gates = picked(scores, scores + m.bias)
    return ids, gates / torch.clamp(gates.sum(-1, keepdim=True), min=1e-2)


def scored_after(m, z):
    values, ids = torch.topk(z, TOP, -1)
    return renormalised((ids, values.sigmoid()))


def chosen_by_biased_logit(m, z):
    ids = torch.topk(z + m.bias, TOP, -1).indices
    return renormalised((ids, z.gather(1, ids).sigmoid()))


def scaled_per_expert(m, z):
    ids, gates = renormalised(softmax_first(m, z))
    return ids, gates * m.scale[ids]


def softplus_root(m, z):
    scores = functional.softplus(z).sqrt()
    return renormalised(picked(scores, scores + m.bias))


def softmax_of_chosen_by_sigmoid(m, z):
    ids = torch.topk(z.sigmoid() + m.bias, TOP, -1).indices
    return ids, z.gather(1, ids).softmax(-1)


def best_one(m, z):
    gates, ids = torch.max(z.sigmoid(), dim=-1, keepdim=True)
    return ids, gates


def sparsemixer(m, z):
    ids, gates, remaining = [], [], z
    for _ in range(2):
        largest, best = remaining.max(dim=-1, keepdim=True)
        far = (largest - z) / z.abs().clamp(min=largest) > 0.02
        gates.append(remaining.masked_fill(far, float("-inf")).softmax(-1).gather(-1, best))
        ids.append(best)
        remaining = z.scatter(-1, best, float("-inf"))
    return torch.cat(ids, -1), torch.cat(gates, -1)


def with_a_null_expert(m, z):
    """Zaya: the last router output stands for no expert."""
    scores = torch.cat((z, z[:, :1].cos()), -1).softmax(-1)
    ids, gates = picked(scores, scores)
    skipped = ids == EXPERTS
    return ids.masked_fill(skipped, 0), gates.masked_fill(skipped, 0)


SUM = Normalize.SUM
READINGS: dict[str, tuple[Router, Routing, bool]] = {
    "softmax, top-k": (softmax_first, Routing(k=TOP), False),
    "softmax, top-k, sum": (lambda m, z: renormalised(softmax_first(m, z)), Routing(k=TOP, normalize=SUM), False),
    "top-k, softmax": (
        softmax_last,
        Routing(k=TOP, choice_on=ChoiceOn.LOGIT, weight_from=WeightFrom.SOFTMAX_SELECTED),
        False,
    ),
    "softmax of gathered": (
        softmax_over_gathered,
        Routing(k=TOP, choice_on=ChoiceOn.LOGIT, weight_from=WeightFrom.SOFTMAX_SELECTED),
        False,
    ),
    "argsort": (sorted_first, Routing(k=TOP), False),
    "groups by their best": (
        deepseek_v2,
        Routing(k=TOP, groups=4, topk_groups=2, group_fill=GroupFill.ZERO, scale=1.5),
        False,
    ),
    "biased groups by their two best": (
        deepseek_v3,
        Routing(
            k=TOP, score=Score.SIGMOID, groups=4, topk_groups=2, group_score=GroupScore.SUM_TOP2, normalize=SUM,
            norm_eps=1e-20, scale=2.5,
        ),
        True,
    ),
    "selection bias": (one_group, Routing(k=TOP, score=Score.SIGMOID), True),
    "least sum": (least_sum, Routing(k=TOP, normalize=SUM, norm_min=1e-2), True),
    "top-k, sigmoid": (
        scored_after,
        Routing(k=TOP, score=Score.SIGMOID, choice_on=ChoiceOn.LOGIT, normalize=SUM),
        False,
    ),
    "biased logits, sigmoid": (
        chosen_by_biased_logit,
        Routing(k=TOP, score=Score.SIGMOID, choice_on=ChoiceOn.LOGIT, normalize=SUM),
        True,
    ),
    "scale per expert": (scaled_per_expert, Routing(k=TOP, normalize=SUM), False),
    "root of softplus": (softplus_root, Routing(k=TOP, score=Score.SQRT_SOFTPLUS, normalize=SUM), True),
    "chosen by sigmoid, softmax": (
        softmax_of_chosen_by_sigmoid,
        Routing(k=TOP, score=Score.SIGMOID, weight_from=WeightFrom.SOFTMAX_SELECTED),
        True,
    ),
    "the best one": (best_one, Routing(k=1, score=Score.SIGMOID), False),
    "null expert": (with_a_null_expert, Routing(k=TOP, null_experts=1), False),
    "sparsemixer": (sparsemixer, Routing(select=Select.SPARSEMIXER, k=2, jitter_eps=0.01), False),
}  # fmt: skip


def joint(m, z):
    """Inkling: routed and shared experts are normalised together."""
    scores = z.sigmoid()
    ids, gates = picked(scores, scores)
    return ids, gates / torch.cat((gates, scores[:, :1]), -1).sum(-1, keepdim=True)


REFUSED = {
    "joint normalisation": (joint, "aten.div.Tensor"),
    "bias in the gates": (lambda m, z: (softmax_first(m, z)[0], softmax_first(m, z)[1] + m.temper), "aten.add"),
    "gates of other logits": (
        lambda m, z: (softmax_first(m, z)[0], z.cos().softmax(-1).gather(1, softmax_first(m, z)[0])),
        "not a function of the logits",
    ),
    "worst experts": (
        lambda m, z: tuple(reversed(torch.topk(z.softmax(-1), TOP, -1, largest=False))),
        "not the best ones",
    ),
    "fixed experts": (lambda m, z: (torch.zeros_like(z[:, :2]).long(), z.softmax(-1)[:, :2]), "no top-k"),
}


@cache
def blocks() -> dict[str, Raised]:
    routers = {name: given[0] for name, given in (*READINGS.items(), *REFUSED.items())}
    # no canonicalisation behind it, which would change the spelling of a routing
    pipeline = "canonicalize,cse,dce,raise-moe,dce"
    return raise_all({name: Block(router) for name, router in routers.items()}, HIDDEN, pipeline)


@pytest.mark.parametrize("name", READINGS)
def test_router(name: str) -> None:
    router, routing, biased = READINGS[name]
    raised = blocks()[name]
    (route,) = raised.named("moe.route")
    assert route.routing == routing
    assert (route.select_bias is not None) == biased
    assert (route.per_expert_scale is not None) == (router is scaled_per_expert)
    left = {name for name in raised.names() if name.startswith("aten.")}
    views = {"aten.view.default", "aten.reshape.default", "aten.permute.default"}
    more_logits = {"aten.cat.default", "aten.cos.default", "aten.slice.Tensor"} if routing.null_experts else set()
    assert left <= {*views, *more_logits, "aten.matmul.default", "aten.mul.Scalar"}
    (experts,) = raised.named("moe.experts")
    assert experts.stored == (*range(EXPERTS), *[-1] * routing.null_experts)
    assert raised.error < 1e-12


@pytest.mark.parametrize("name", REFUSED)
def test_other_arithmetic_is_refused(name: str) -> None:
    raised = blocks()[name]
    assert not raised.named("moe.route")
    assert any(REFUSED[name][1] in refusal.reason for refusal in raised.refusals)
    assert raised.error < 1e-12


class DenseBlock(nn.Module):
    """Llama 4: every expert for every token, on inputs that are zero where it was not chosen."""

    def __init__(self, top: int, combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.gate = nn.Parameter(torch.randn(EXPERTS, WIDTH, generator=generator))
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 48, generator=generator))
        self.down = nn.Parameter(torch.randn(EXPERTS, 24, WIDTH, generator=generator))
        self.top, self.combine = top, combine

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, WIDTH)
        logits = tokens @ self.gate.T
        values, ids = torch.topk(logits, self.top, dim=1)
        scores = torch.full_like(logits, float("-inf")).scatter_(1, ids, values).sigmoid()
        routed = tokens.repeat(EXPERTS, 1) * scores.transpose(0, 1).reshape(-1, 1)
        gate, up = torch.bmm(routed.view(EXPERTS, -1, WIDTH), self.up).chunk(2, dim=-1)
        outputs = torch.bmm(self.combine(gate, up), self.down).view(-1, WIDTH)
        return outputs.reshape(EXPERTS, -1, WIDTH).sum(dim=0).view(x.shape)


@cache
def dense_blocks() -> dict[str, Raised]:
    parts = {str(top): DenseBlock(top, lambda gate, up: up * functional.silu(gate)) for top in (1, 2)}
    parts["not zero"] = DenseBlock(1, lambda gate, up: up + gate.sigmoid())
    return raise_all(parts, HIDDEN, "canonicalize,cse,dce,raise-moe,dce")


@pytest.mark.parametrize("top", [1, 2])
def test_experts_of_every_token_become_sparse(top: int) -> None:
    raised = dense_blocks()[str(top)]
    (route,) = raised.named("moe.route")
    assert route.routing == Routing(k=top, score=Score.SIGMOID, choice_on=ChoiceOn.LOGIT)
    (experts,) = raised.named("moe.experts")
    assert experts.expert_count == EXPERTS and experts.ids.type.shape[1] == 1
    assert not raised.named("aten.bmm.default") and not raised.named("aten.repeat.default")
    assert raised.error < 1e-12


def test_experts_that_give_something_for_zero_stay_dense() -> None:
    raised = dense_blocks()["not zero"]
    assert not raised.named("moe.experts")
    assert raised.error < 1e-12


MUTATIONS = {
    "renormalisation dropped": (deepseek_v3, {"normalize": Normalize.NONE}),
    "scale dropped": (deepseek_v3, {"scale": 1.0}),
    "groups dropped": (deepseek_v3, {"topk_groups": 4}),
    "groups by their best": (deepseek_v3, {"group_score": GroupScore.MAX}),
    "other score": (deepseek_v3, {"score": Score.SOFTMAX}),
    "filled with zero instead of -inf": (deepseek_v3, {"group_fill": GroupFill.ZERO}),
    "least sum dropped": (least_sum, {"norm_min": 0.0}),
    "chosen by logits": (least_sum, {"choice_on": ChoiceOn.LOGIT}),
    "another rank": (softmax_first, {"rank_offset": 1}),
    "softmax over the chosen ones": (softmax_first, {"weight_from": WeightFrom.SOFTMAX_SELECTED}),
    "other jitter": (sparsemixer, {"jitter_eps": 0.05}),
}


@cache
def read() -> tuple[Module, dict[Router, tuple[ExpertsOp, RouterReading]]]:
    """Traced routers and how they are read."""
    routers = (deepseek_v3, least_sum, softmax_first, sparsemixer)
    blocks = Several({router.__name__: Block(router) for router in routers})
    module = load_torch(blocks, {"x": HIDDEN}, dynamic={"x": {0: "batch", 1: "seq"}})
    experts = [op for op in module.main.body if isinstance(op, ExpertsOp)]
    readings = [read_router(op.ids, op.gates)[0] for op in experts]
    return module, dict(zip(routers, zip(experts, readings, strict=True), strict=True))


def problem(router: Router, weights: bool = True, bias: bool = True, **changes: object) -> str:
    """What the check says of the reading of a router with other stages."""
    module, found = read()
    experts, reading = found[router]
    wrong = replace(reading, routing=replace(reading.routing, **changes))
    wrong = wrong if bias else replace(wrong, select_bias=None)
    return RouterCheck(module.weights if weights else None).problem(experts.ids, experts.gates, wrong)


@pytest.mark.parametrize(("router", "changes"), MUTATIONS.values(), ids=MUTATIONS)
def test_check_finds_a_wrong_reading(router: Router, changes: dict) -> None:
    assert problem(router) == ""
    assert "random tokens" in problem(router, **changes)


def test_check_finds_a_missing_bias() -> None:
    assert "random tokens" in problem(deepseek_v3, bias=False)


def test_without_weights_the_check_takes_random_biases() -> None:
    assert problem(deepseek_v3, weights=False) == ""
    assert "random tokens" in problem(deepseek_v3, weights=False, bias=False)
