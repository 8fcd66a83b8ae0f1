"""Every stage of `moe.route`: against plain Python on random routings, its invariants, and its edges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

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
from moec.reference.route import RouteInputs, route
from tests.numerics.plain_route import TokenInputs, plain_route

EXPERTS, TOKENS = 12, 7
NULLS = st.sampled_from([0, 0, 1, 3])


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    """Any routing that its verifier accepts for 12 experts, sparsemixer excepted."""
    select = draw(st.sampled_from([kind for kind in Select if kind is not Select.SPARSEMIXER]))
    softmax_only = select in (Select.TOPP, Select.ENTROPY)
    groups = draw(st.sampled_from([1, 2, 3, 4, 6]))
    weight_from = draw(st.sampled_from(WeightFrom))
    k = draw(st.integers(1, 4)) * (groups if select is Select.PER_GROUP_TOPK else 1)
    nulls = draw(NULLS)
    routing = Routing(
        softcap=draw(st.sampled_from([0.0, 1.5])),
        bias_unit=draw(st.sampled_from(BiasUnit)),
        temperature=draw(st.sampled_from([1.0, 0.6])),
        score=Score.SOFTMAX if softmax_only else draw(st.sampled_from(Score)),
        choice_on=draw(st.sampled_from(ChoiceOn)),
        groups=groups,
        topk_groups=draw(st.integers(0, groups)),
        group_score=draw(st.sampled_from(GroupScore)),
        group_fill=draw(st.sampled_from(GroupFill)),
        select=select,
        k=k if select in (Select.TOPK, Select.PER_GROUP_TOPK) else 0,
        k_min=draw(st.integers(1, 3)),
        k_max=0 if select is not Select.TOPP else draw(st.sampled_from([0, 4])),
        rank_offset=draw(st.sampled_from([0, 1])) if select is Select.TOPK else 0,
        p=draw(st.sampled_from([0.3, 0.7, 1.0])) if select in (Select.TOPP, Select.ENTROPY, Select.THRESHOLD) else 0.0,
        take_crossing=draw(st.booleans()),
        entropy_q=draw(st.sampled_from([1.0, 1.1])),
        entropy_threshold=draw(st.sampled_from([0.5, 2.0])),
        skip_ratio=draw(st.sampled_from([0.0, 0.5])),
        weight_from=weight_from,
        null_experts=nulls,
        normalize=Normalize.NONE if weight_from is WeightFrom.SOFTMAX_SELECTED else draw(st.sampled_from(Normalize)),
        norm_over=draw(st.sampled_from(NormOver)) if nulls else NormOver.SELECTED,
        norm_eps=draw(st.sampled_from([0.0, 0.1])),
        norm_min=draw(st.sampled_from([0.0, 0.8])),
        scale=draw(st.sampled_from([1.0, 2.5])),
        offset=draw(st.sampled_from([0.0, 0.5])),
    )
    assume(routing.problem(EXPERTS) is None)
    # all scores sum up to 1 but for rounding: whether the last one crosses p = 1 is a tie
    assume(routing.take_crossing or routing.p != 1 or routing.select is Select.THRESHOLD)
    return routing


def make_inputs(routing: Routing, seed: int, operands: frozenset[str]) -> RouteInputs:
    """Random operands for a routing, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    values: dict[str, torch.Tensor] = {}
    if "logit_bias" in operands:
        values["logit_bias"] = normal(TOKENS, EXPERTS)
    if "mask" in operands:
        values["mask"] = torch.rand(TOKENS, EXPERTS, generator=generator) < 0.7
    if "override" in operands and routing.weight_from is not WeightFrom.SOFTMAX_SELECTED:
        values["score_override"] = normal(TOKENS, EXPERTS).softmax(-1)
        values["override_on"] = torch.arange(TOKENS) % 2 == 0
    if "select_bias" in operands:
        values["select_bias"] = normal(EXPERTS)
    if "per_expert_scale" in operands:
        values["per_expert_scale"] = normal(EXPERTS).abs()
    if routing.select is Select.FORCED:
        ids = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)[:, :4]
        values["forced_ids"] = torch.where(torch.rand(TOKENS, 4, generator=generator) < 0.3, -1, ids)
    return RouteInputs(normal(TOKENS, EXPERTS) * 2, **values)


OPERANDS = st.frozensets(st.sampled_from(["logit_bias", "mask", "override", "select_bias", "per_expert_scale"]))


@settings(max_examples=300, deadline=None)
@given(routings(), st.integers(0, 10**6), OPERANDS)
def test_equals_plain_python_and_keeps_invariants(routing: Routing, seed: int, operands: frozenset[str]) -> None:
    inputs = make_inputs(routing, seed, operands)
    ids, gates, count = route(inputs, routing)
    slots = 4 if routing.select is Select.FORCED else routing.slots(EXPERTS)
    assert ids.shape == gates.shape == (TOKENS, slots)
    for token in range(TOKENS):
        expected = plain_route(_row(inputs, token), routing)
        assert ids[token, : int(count[token])].tolist() == [expert for expert, _ in expected]
        expected_gates = torch.tensor([gate for _, gate in expected], dtype=torch.float64)
        assert torch.allclose(gates[token, : int(count[token])], expected_gates, rtol=1e-9, atol=1e-12)
        # R1 ids distinct and in range, R3 nothing behind the valid slots
        assert len(set(ids[token, : int(count[token])].tolist())) == int(count[token])
        assert not gates[token, int(count[token]) :].any() and not ids[token, int(count[token]) :].any()
    assert bool(((ids >= 0) & (ids < EXPERTS - routing.null_experts)).all())
    # R2
    assert bool(gates.isfinite().all())
    if routing.score is not Score.IDENTITY:
        assert bool((gates >= 0).all())
    # R5
    assert bool((count <= slots).all())


@settings(max_examples=60, deadline=None)
@given(routings(), st.integers(0, 10**6))
def test_normalised_gates_sum_to_the_scale(routing: Routing, seed: int) -> None:
    """R4."""
    assume(routing.weight_from is not WeightFrom.SCORE or routing.score in (Score.SOFTMAX, Score.SIGMOID))
    routing = replace(routing, normalize=Normalize.SUM, norm_eps=0.0, norm_min=0.0, null_experts=0, offset=0.0)
    routing = replace(routing, norm_over=NormOver.SELECTED)
    assume(routing.problem(EXPERTS) is None)
    _, gates, count = route(make_inputs(routing, seed, frozenset()), routing)
    total = gates.sum(1)
    assert torch.allclose(total[count > 0], torch.full_like(total[count > 0], routing.scale), atol=1e-9)
    _, smaller, _ = route(make_inputs(routing, seed, frozenset()), replace(routing, norm_eps=0.2))
    assert bool((smaller.sum(1) <= routing.scale + 1e-9).all())


@settings(max_examples=60, deadline=None)
@given(routings(), st.integers(0, 10**6), st.floats(-3, 3))
def test_selection_ignores_shifts_and_follows_permutations(routing: Routing, seed: int, shift: float) -> None:
    """R6: a constant on all logits changes nothing under softmax; permuted experts give permuted ids."""
    routing = replace(routing, softcap=0.0, score=Score.SOFTMAX, groups=1, topk_groups=0, null_experts=0)
    routing = replace(routing, norm_over=NormOver.SELECTED)
    assume(routing.weight_from is not WeightFrom.SIGMOID_LOGIT and routing.select is not Select.FORCED)
    assume(not (routing.choice_on is ChoiceOn.LOGIT and routing.select is Select.THRESHOLD))
    assume(routing.problem(EXPERTS) is None)
    inputs = make_inputs(routing, seed, frozenset({"select_bias"}))
    ids, gates, _ = route(inputs, routing)
    shifted_ids, shifted_gates, _ = route(replace(inputs, logits=inputs.logits + shift), routing)
    assert torch.equal(ids, shifted_ids) and torch.allclose(gates, shifted_gates, atol=1e-9)

    order = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(seed))
    assert inputs.select_bias is not None
    permuted = replace(inputs, logits=inputs.logits[:, order], select_bias=inputs.select_bias[order])
    new_ids, new_gates, count = route(permuted, routing)
    valid = torch.arange(ids.shape[1]) < count[:, None]
    assert torch.equal(order[new_ids][valid], ids[valid]) and torch.allclose(new_gates, gates, atol=1e-9)


def _row(inputs: RouteInputs, token: int) -> TokenInputs:
    def row(value: torch.Tensor | None) -> list[float] | None:
        return None if value is None else list((value if value.ndim == 1 else value[token]).tolist())

    overridden = inputs.override_on is not None and bool(inputs.override_on[token])
    forced = row(inputs.forced_ids)
    mask = row(inputs.mask)
    return TokenInputs(
        logits=row(inputs.logits) or [],
        logit_bias=row(inputs.logit_bias),
        mask=None if mask is None else [bool(value) for value in mask],
        override=row(inputs.score_override) if overridden else None,
        select_bias=row(inputs.select_bias),
        forced_ids=None if forced is None else [int(value) for value in forced],
        per_expert_scale=row(inputs.per_expert_scale),
    )


def test_ties_go_to_the_lower_index() -> None:
    logits = torch.zeros(3, 600)
    logits[1, [500, 20, 577]] = 1.0
    ids, gates, _ = route(RouteInputs(logits), Routing(k=4))
    assert ids.tolist() == [[0, 1, 2, 3], [20, 500, 577, 0], [0, 1, 2, 3]]
    assert torch.allclose(gates[0], torch.full((4,), 1 / 600))
    grouped, _, _ = route(RouteInputs(torch.zeros(1, 8)), Routing(k=2, groups=4, topk_groups=2))
    assert grouped.tolist() == [[0, 1]]


def test_logits_are_at_least_float32() -> None:
    logits = torch.randn(4, 8)
    halved, _, _ = route(RouteInputs(logits.bfloat16()), Routing(k=2))
    _, gates, _ = route(RouteInputs(logits.bfloat16()), Routing(k=2))
    assert gates.dtype == torch.float32 and halved.dtype == torch.int64
    assert route(RouteInputs(logits.double()), Routing(k=2))[1].dtype == torch.float64


def test_token_whose_experts_are_all_masked_gets_none() -> None:
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0] = False
    for routing in (Routing(k=2), Routing(k=2, score=Score.SIGMOID), Routing(k=2, normalize=Normalize.SUM)):
        ids, gates, count = route(RouteInputs(torch.randn(2, 6), mask=mask), routing)
        assert count.tolist() == [0, 2]
        assert not ids[0].any() and not gates[0].any() and bool(gates.isfinite().all())


def test_group_fill_zero_differs_from_never() -> None:
    """Where every choice of the kept groups is negative, an expert of a dropped group filled with 0 wins."""
    logits = torch.tensor([[5.0, 4.0, 0.0, 0.0]])
    bias = torch.tensor([-3.0, -3.0, -9.0, -9.0])
    never = Routing(k=1, score=Score.SIGMOID, groups=2, topk_groups=1)
    zero = replace(never, group_fill=GroupFill.ZERO)
    assert route(RouteInputs(logits, select_bias=bias), never)[0].tolist() == [[0]]
    assert route(RouteInputs(logits, select_bias=bias), zero)[0].tolist() == [[2]]


def test_sparsemixer_gates_are_probabilities_of_distinct_experts() -> None:
    logits = torch.randn(200, 8)
    shared = []
    for jitter in (0.01, 0.5):
        routing = Routing(k=2, select=Select.SPARSEMIXER, jitter_eps=jitter)
        ids, gates, count = route(RouteInputs(logits), routing)
        assert bool((ids[:, 0] != ids[:, 1]).all()) and bool((count == 2).all())
        assert bool(((gates > 0) & (gates <= 1)).all())
        shared.append(int((gates < 0.999).sum()))
    assert shared[0] < 40 < 200 < shared[1], "a wider jitter lets more experts share the softmax"


def test_gradients_reach_logits_and_scales() -> None:
    torch.manual_seed(1)
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64)
    for routing in (
        Routing(k=2, normalize=Normalize.SUM),
        Routing(k=3, score=Score.SIGMOID, scale=2.0),
        Routing(k=2, weight_from=WeightFrom.SOFTMAX_SELECTED, choice_on=ChoiceOn.LOGIT),
        Routing(k=2, select=Select.SPARSEMIXER, jitter_eps=0.4),
    ):

        def gates(z: torch.Tensor, s: torch.Tensor, routing: Routing = routing) -> torch.Tensor:
            return route(RouteInputs(z, select_bias=bias, per_expert_scale=s), routing)[1]

        assert torch.autograd.gradcheck(gates, (logits, scale))


@pytest.mark.parametrize(
    "routing",
    [
        Routing(k=2),
        Routing(k=2, score=Score.SIGMOID, groups=3, topk_groups=1, group_score=GroupScore.SUM_TOP2),
        Routing(k=3, choice_on=ChoiceOn.LOGIT, weight_from=WeightFrom.SOFTMAX_SELECTED),
        Routing(k=3, select=Select.PER_GROUP_TOPK, groups=3),
        Routing(select=Select.TOPP, p=0.4),
        Routing(select=Select.THRESHOLD, p=0.9),
        Routing(k=2, select=Select.SPARSEMIXER, jitter_eps=0.1),
    ],
    ids=lambda routing: f"{routing.select.value}-{routing.score.value}",
)
def test_steered_expert_comes_first_with_a_gate_that_counts(routing: Routing) -> None:
    torch.manual_seed(0)
    logits, bias = torch.randn(EXPERTS, EXPERTS) * 5, torch.randn(EXPERTS) * 50
    select_bias = None if routing.select is Select.SPARSEMIXER else bias
    steering = torch.arange(EXPERTS)
    steering[0] = -1
    ids, gates, count = route(RouteInputs(logits, select_bias=select_bias, steering=steering), routing)
    assert torch.equal(ids[1:, 0], steering[1:])
    assert float(gates[1:, 0].min()) > 0.5 and int(count.min()) >= 1
    free = route(RouteInputs(logits, select_bias=select_bias), routing)
    assert torch.equal(ids[0], free[0][0]) and torch.equal(gates[0], free[1][0])


def test_steering_does_not_lift_a_mask() -> None:
    mask = torch.ones(4, dtype=torch.bool)
    mask[3] = False
    ids, _, count = route(RouteInputs(torch.randn(1, 4), mask=mask, steering=torch.tensor([3])), Routing(k=4))
    assert count.tolist() == [3] and 3 not in ids[0, :3].tolist()
