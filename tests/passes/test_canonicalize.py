"""Before and expected for each pattern of canonicalize, and what must stay."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moec.dialects.builtin import FuncOp, ModuleOp, WeightOp
from moec.dialects.moe import (
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
from moec.ir import DType, TensorType, Value
from moec.passes.canonicalize import PATTERNS
from tests.passes.text import assert_becomes, function, run

X = "%x: f32[batch, 6, 4]"
# name: (arguments, before, expected)
REWRITES = {
    "copies": (
        X,
        """%a = clone.default(self=%x) -> f32[batch, 6, 4]
        %b = contiguous.default(self=%a) -> f32[batch, 6, 4]
        %c = detach.default(self=%b) -> f32[batch, 6, 4]
        %d = alias.default(self=%c) -> f32[batch, 6, 4]
        return %d""",
        "return %x",
    ),
    "dropout of evaluation": (
        X,
        """%a = dropout.default(input=%x, p=0.1, train=false) -> f32[batch, 6, 4]
        %b, %m = native_dropout.default(input=%a, p=0.1, train=false) -> (f32[batch, 6, 4], i1[batch, 6, 4])
        return %b""",
        "return %x",
    ),
    "shapes and types that stay": (
        X,
        """%a = view.default(self=%x, size=[$batch, 6, 4]) -> f32[batch, 6, 4]
        %b = expand.default(self=%a, size=[$batch, 6, 4]) -> f32[batch, 6, 4]
        %c = _to_copy.default(self=%b, dtype=f32) -> f32[batch, 6, 4]
        %d = squeeze.dim(self=%c, dim=1) -> f32[batch, 6, 4]
        %e = slice.Tensor(self=%d, dim=1, end=9223372036854775807, start=0) -> f32[batch, 6, 4]
        %f = cat.default(tensors=%e) -> f32[batch, 6, 4]
        %g = chunk.default(self=%f, chunks=1) -> f32[batch, 6, 4]
        %h = constant_pad_nd.default(self=%g, pad=[0, 0]) -> f32[batch, 6, 4]
        %i = repeat.default(self=%h, repeats=[1, 1, 1]) -> f32[batch, 6, 4]
        %j = permute.default(self=%i, dims=[0, 1, -1]) -> f32[batch, 6, 4]
        return %j""",
        "return %x",
    ),
    "neutral elements": (
        X,
        """%a = mul.Tensor(self=%x, other=1) -> f32[batch, 6, 4]
        %b = mul.Scalar(self=%a, other=1.0) -> f32[batch, 6, 4]
        %c = div.Tensor(self=%b, other=1.0) -> f32[batch, 6, 4]
        %d = sub.Tensor(self=%c, other=0) -> f32[batch, 6, 4]
        %e = pow.Tensor_Scalar(self=%d, exponent=1) -> f32[batch, 6, 4]
        return %e""",
        "return %x",
    ),
    "integers plus zero": (
        "%x: i64[4]",
        """%a = add.Tensor(self=%x, other=0) -> i64[4]
        return %a""",
        "return %x",
    ),
    "double negation": (
        X,
        """%a = neg.default(self=%x) -> f32[batch, 6, 4]
        %b = neg.default(self=%a) -> f32[batch, 6, 4]
        return %b""",
        "return %x",
    ),
    "view of view": (
        X,
        """%a = view.default(self=%x, size=[$batch, 24]) -> f32[batch, 24]
        %b = view.default(self=%a, size=[$batch, 3, 8]) -> f32[batch, 3, 8]
        return %b""",
        """%b = reshape.default(self=%x, shape=[$batch, 3, 8]) -> f32[batch, 3, 8]
        return %b""",
    ),
    "view and back": (
        X,
        """%a = view.default(self=%x, size=[$(batch * 6), 4]) -> f32[batch * 6, 4]
        %b = view.default(self=%a, size=[$batch, 6, 4]) -> f32[batch, 6, 4]
        return %b""",
        "return %x",
    ),
    "unsqueeze and squeeze": (
        X,
        """%a = unsqueeze.default(self=%x, dim=1) -> f32[batch, 1, 6, 4]
        %b = squeeze.dim(self=%a, dim=1) -> f32[batch, 6, 4]
        return %b""",
        "return %x",
    ),
    "expand of expand": (
        "%x: f32[batch, 1, 1]",
        """%a = expand.default(self=%x, size=[$batch, 6, 1]) -> f32[batch, 6, 1]
        %b = expand.default(self=%a, size=[$batch, 6, 4]) -> f32[batch, 6, 4]
        return %b""",
        """%b = expand.default(self=%x, size=[$batch, 6, 4]) -> f32[batch, 6, 4]
        return %b""",
    ),
    "cast there and back": (
        X,
        """%a = _to_copy.default(self=%x, dtype=f64) -> f64[batch, 6, 4]
        %b = to.dtype(self=%a, dtype=f32) -> f32[batch, 6, 4]
        return %b""",
        "return %x",
    ),
    "cast through a wider type": (
        X,
        """%a = _to_copy.default(self=%x, dtype=f64) -> f64[batch, 6, 4]
        %b = _to_copy.default(self=%a, dtype=f16) -> f16[batch, 6, 4]
        return %b""",
        """%b = _to_copy.default(self=%x, dtype=f16) -> f16[batch, 6, 4]
        return %b""",
    ),
    "transpose twice": (
        X,
        """%a = transpose.int(self=%x, dim0=1, dim1=2) -> f32[batch, 4, 6]
        %b = transpose.int(self=%a, dim0=-1, dim1=-2) -> f32[batch, 6, 4]
        return %b""",
        "return %x",
    ),
    "permutations": (
        X,
        """%a = permute.default(self=%x, dims=[1, 2, 0]) -> f32[6, 4, batch]
        %b = transpose.int(self=%a, dim0=0, dim1=1) -> f32[4, 6, batch]
        %c = permute.default(self=%x, dims=[1, 2, 0]) -> f32[6, 4, batch]
        %d = permute.default(self=%c, dims=[1, 2, 0]) -> f32[4, batch, 6]
        return %b, %d""",
        """%b = transpose.int(self=%x, dim0=0, dim1=2) -> f32[4, 6, batch]
        %d = permute.default(self=%x, dims=[2, 0, 1]) -> f32[4, batch, 6]
        return %b, %d""",
    ),
    "slice of slice": (
        "%x: f32[20]",
        """%a = slice.Tensor(self=%x, dim=0, end=-1, start=2, step=2) -> f32[9]
        %b = slice.Tensor(self=%a, dim=0, end=8, start=1, step=3) -> f32[3]
        return %b""",
        """%b = slice.Tensor(self=%x, end=17, start=4, step=6) -> f32[3]
        return %b""",
    ),
}  # fmt: skip

# name: (arguments, text that stays, what --explain says of it)
STAYS = {
    "floats plus zero": (
        X,
        """%a = add.Tensor(self=%x, other=0) -> f32[batch, 6, 4]
        return %a""",
        "x + 0 is not x where x is -0.0",
    ),
    "minus negative zero": (
        X,
        """%a = sub.Tensor(self=%x, other=-0.0) -> f32[batch, 6, 4]
        return %a""",
        "x - -0.0 is not x where x is -0.0",
    ),
    "dropout of training": (
        X,
        """%a = dropout.default(input=%x, p=0.1, train=true) -> f32[batch, 6, 4]
        return %a""",
        "it is dropout of training",
    ),
    "cast through a narrower type": (
        X,
        """%a = _to_copy.default(self=%x, dtype=f16) -> f16[batch, 6, 4]
        %b = _to_copy.default(self=%a, dtype=f32) -> f32[batch, 6, 4]
        return %b""",
        "f32 does not survive f16",
    ),
    "multiplication by true": (
        "%x: f32[4]",
        """%a = mul.Tensor(self=%x, other=true) -> f32[4]
        return %a""",
        "",
    ),
    "product that changes the type": (
        "%x: i64[4]",
        """%a = mul.Tensor(self=%x, other=1.0) -> f32[4]
        return %a""",
        "",
    ),
    "padding that moves": (
        "%x: f32[4]",
        """%a = constant_pad_nd.default(self=%x, pad=[1, -1]) -> f32[4]
        return %a""",
        "",
    ),
    "slices of different axes": (
        X,
        """%a = slice.Tensor(self=%x, dim=1, end=3, start=1) -> f32[batch, 2, 4]
        %b = slice.Tensor(self=%a, dim=2, end=3, start=1) -> f32[batch, 2, 2]
        return %b""",
        "",
    ),
    "transposition of a square": (
        "%x: f32[4, 4]",
        """%a = t.default(self=%x) -> f32[4, 4]
        return %a""",
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REWRITES)
def test_becomes(name: str) -> None:
    arguments, before, expected = REWRITES[name]
    report = assert_becomes(function(arguments, before), "canonicalize", function(arguments, expected))
    assert report.records[0].statistics["rewritten"] > 0


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str) -> None:
    arguments, text, reason = STAYS[name]
    report = assert_becomes(function(arguments, text), "canonicalize", function(arguments, text))
    assert report.records[0].statistics["rewritten"] == 0
    assert [refusal.reason for refusal in report.records[0].refusals] == ([reason] if reason else [])


# -- routing --------------------

PLAIN = Routing(k=2, choice_on=ChoiceOn.LOGIT)
ROUTINGS = {
    "softmax, then the sum of the selected": (
        Routing(k=2, normalize=Normalize.SUM),
        replace(PLAIN, weight_from=WeightFrom.SOFTMAX_SELECTED),
    ),
    "choice on a monotone score": (Routing(k=2, score=Score.SIGMOID), replace(PLAIN, score=Score.SIGMOID)),
    "topp of everything": (
        Routing(select=Select.TOPP, p=1.0, k_min=2, k_max=3),
        replace(PLAIN, k=3),
    ),
    "topk of everything": (
        Routing(k=8),
        Routing(select=Select.ALL, choice_on=ChoiceOn.LOGIT),
    ),
    "topp of everything without a limit": (
        Routing(select=Select.TOPP, p=1.0),
        Routing(select=Select.ALL, choice_on=ChoiceOn.LOGIT),
    ),
    "groups that all stay": (
        Routing(k=2, groups=4, topk_groups=4, group_score=GroupScore.SUM_TOP2, group_fill=GroupFill.ZERO),
        PLAIN,
    ),
    "one group": (Routing(k=2, select=Select.PER_GROUP_TOPK), PLAIN),
    "idle numbers": (
        Routing(k=2, p=0.5, k_min=2, k_max=2, entropy_q=2.0, entropy_threshold=0.1, jitter_eps=0.01, norm_eps=0.1),
        PLAIN,
    ),
    "groups of which the best stay": (
        Routing(k=2, groups=4, topk_groups=2),
        Routing(k=2, groups=4, topk_groups=2, choice_on=ChoiceOn.LOGIT),
    ),
}
ROUTINGS_THAT_STAY = {
    "relu makes ties": (Routing(k=2, score=Score.RELU), ""),
    "groups rated by a sum of scores": (
        Routing(k=2, groups=4, topk_groups=2, group_score=GroupScore.SUM_TOP2),
        "groups are rated by a sum of scores",
    ),
    "groups filled with zero": (
        Routing(k=2, groups=4, topk_groups=2, group_fill=GroupFill.ZERO),
        "experts outside the groups compete with the score 0",
    ),
    "a sum with an epsilon": (
        Routing(k=2, normalize=Normalize.SUM, norm_eps=1e-6, choice_on=ChoiceOn.LOGIT),
        "the sum is not the plain sum of the selected scores",
    ),
    "a sum without null experts": (
        Routing(k=2, normalize=Normalize.SUM, norm_over=NormOver.TRUE, null_experts=2, choice_on=ChoiceOn.LOGIT),
        "the sum leaves out null experts",
    ),
    "threshold on the score": (
        Routing(select=Select.THRESHOLD, p=0.2, normalize=Normalize.SUM),
        "threshold selection reads the score itself",
    ),
    "topp of everything among the best groups": (
        Routing(select=Select.TOPP, p=1.0, groups=4, topk_groups=2, choice_on=ChoiceOn.LOGIT),
        "",
    ),
    "no renormalisation": (PLAIN, ""),
    "sigmoid divided by its sum": (
        Routing(k=2, score=Score.SIGMOID, normalize=Normalize.SUM, choice_on=ChoiceOn.LOGIT),
        "",
    ),
    "ranks that start late": (Routing(k=7, rank_offset=1, choice_on=ChoiceOn.LOGIT), ""),
}


def route_module(routing: Routing, *, select_bias: bool = False) -> ModuleOp:
    """logits [tokens, 8] -> ids, gates, count."""
    main = FuncOp.build("main", [TensorType((5, 8), DType.F32)])
    bias: Value | None = None
    if select_bias:
        op = WeightOp(result_types=[TensorType((8,), DType.F32)], weight_name="bias", source="bias")
        main.body.append(op)
        bias = op.value
    route = RouteOp(main.arguments[0], None, None, None, None, bias, routing=routing)
    main.body.append(route)
    main.finish(list(route.results))
    return ModuleOp.build([main])


@pytest.mark.parametrize("name", ROUTINGS)
def test_routing_becomes(name: str) -> None:
    before, expected = ROUTINGS[name]
    assert_becomes(route_module(before), "canonicalize", route_module(expected))


@pytest.mark.parametrize("name", ROUTINGS_THAT_STAY)
def test_routing_stays(name: str) -> None:
    routing, reason = ROUTINGS_THAT_STAY[name]
    report = assert_becomes(route_module(routing), "canonicalize", route_module(routing))
    assert [refusal.reason for refusal in report.records[0].refusals] == ([reason] if reason else [])


def test_a_selection_bias_keeps_the_choice_on_scores() -> None:
    routing = Routing(k=2, normalize=Normalize.SUM)
    module = route_module(routing, select_bias=True)
    expected = replace(routing, normalize=Normalize.NONE, weight_from=WeightFrom.SOFTMAX_SELECTED)
    report = assert_becomes(module, "canonicalize", route_module(expected, select_bias=True))
    assert [refusal.reason for refusal in report.records[0].refusals] == ["select_bias is added to the score"]


def test_every_pattern_fires_in_some_test() -> None:
    from moec.rewrite import apply_patterns

    fired: set[str] = set()
    for arguments, before, _ in REWRITES.values():
        fired |= set(apply_patterns(function(arguments, before), PATTERNS).changed)
    for before, _ in ROUTINGS.values():
        fired |= set(apply_patterns(route_module(before), PATTERNS).changed)
    assert fired == {pattern.name for pattern in PATTERNS}


def test_dead_operations_go_with_it() -> None:
    module = function(
        "%x: f32[4]",
        """%a = neg.default(self=%x) -> f32[4]
        %b = abs.default(self=%a) -> f32[4]
        return %x""",
    )
    report = run(module, "canonicalize")
    assert report.records[0].statistics == {"rewritten": 0, "erased": 2}
