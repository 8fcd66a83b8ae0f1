"""canonicalize keeps the function: random routings, and each aten rewrite, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moec.dialects.builtin import FuncOp, ModuleOp
from moec.dialects.moe import Normalize, RouteOp, Routing, Score, Select
from moec.ir import DimExpr, DType, TensorType
from moec.reference.executor import Executor
from moec.reference.route import RouteInputs, route
from tests.numerics.test_route import EXPERTS, OPERANDS, TOKENS, make_inputs, routings
from tests.passes.test_canonicalize import REWRITES
from tests.passes.text import function, run

NAMES = (
    "logits",
    "logit_bias",
    "mask",
    "score_override",
    "override_on",
    "select_bias",
    "forced_ids",
    "per_expert_scale",
)
NEUTRAL = Routing(k=1)
DTYPES = {torch.float64: DType.F64, torch.bool: DType.I1, torch.int64: DType.I64}


def canonical(routing: Routing, inputs: RouteInputs) -> Routing:
    """What canonicalize makes of a routing with these operands."""
    given_tensors = [getattr(inputs, name) for name in NAMES]
    kinds = [TensorType(tuple(tensor.shape), DTYPES[tensor.dtype]) for tensor in given_tensors if tensor is not None]
    main = FuncOp.build("main", kinds)
    arguments = iter(main.arguments)
    op = RouteOp(*[None if tensor is None else next(arguments) for tensor in given_tensors], routing=routing)
    main.body.append(op)
    main.finish(list(op.results))
    module = ModuleOp.build([main])
    types = main.function_type
    run(module, "canonicalize")
    assert main.function_type == types
    found = next(op for op in module.walk() if isinstance(op, RouteOp))
    return found.routing


@settings(max_examples=200, deadline=None)
@example(
    replace(NEUTRAL, select=Select.TOPP, k=0, k_max=4, p=1.0, skip_ratio=0.5), 0, frozenset({"select_bias"})
)  # experts that are skipped make room for others
@given(routings(), st.integers(0, 10**6), OPERANDS)
def test_routing(routing: Routing, seed: int, operands: frozenset[str]) -> None:
    inputs = make_inputs(routing, seed, operands)
    rewritten = canonical(routing, inputs)
    ids, gates, count = route(inputs, routing)
    new_ids, new_gates, new_count = route(inputs, rewritten)
    assert torch.equal(ids, new_ids) and torch.equal(count, new_count)
    assert torch.allclose(gates, new_gates, rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(Score)), st.sampled_from(list(Normalize)), st.integers(0, 10**6), OPERANDS)
def test_routing_to_all_experts(score: Score, normalize: Normalize, seed: int, operands: frozenset[str]) -> None:
    routing = Routing(k=EXPERTS, score=score, normalize=normalize)
    inputs = make_inputs(routing, seed, operands)
    rewritten = canonical(routing, inputs)
    assert rewritten.select is Select.ALL
    for before, after in zip(route(inputs, routing), route(inputs, rewritten), strict=True):
        assert torch.allclose(before, after, rtol=1e-9, atol=1e-12)


def test_random_routings_are_rewritten_often_enough() -> None:
    """The property above would hold of a pass that does nothing."""
    changed = [
        canonical(routing, make_inputs(routing, 0, frozenset())) != routing
        for routing in (
            Routing(k=EXPERTS),
            Routing(select=Select.TOPP, p=1.0, k_max=3),
            Routing(k=2, groups=3, topk_groups=3),
        )
    ]
    assert all(changed) and TOKENS > 1


@pytest.mark.parametrize("name", REWRITES)
def test_aten(name: str) -> None:
    arguments, before, _ = REWRITES[name]
    module = function(arguments, before)
    [kind] = [argument.type for argument in module.main.arguments]
    assert isinstance(kind, TensorType)
    shape = [3 if isinstance(size, DimExpr) else size for size in kind.shape]
    values = torch.randint(-9, 9, shape) if kind.dtype is DType.I64 else torch.randn(shape, dtype=torch.float64)
    inputs = {"argument0": values}
    expected = Executor(module, {}, dtype=torch.float64).run(inputs)
    run(module, "canonicalize")
    found = Executor(module, {}, dtype=torch.float64).run(inputs)
    assert list(found) == list(expected)
    for key in expected:
        assert torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype
