"""`moe.route` in ai.onnx against the reference executor, on any routing that its verifier accepts."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from moec.dialects.moe import RouteOp, Routing, Select
from moec.ir import DType, TensorType, symbol
from tests.codegen.running import assert_close, emit_and_run, module_of, one_operation, reference
from tests.numerics.test_route import EXPERTS, OPERANDS, TOKENS, make_inputs, routings

COUNT = symbol("count")
ORDER = (
    "logit_bias",
    "mask",
    "score_override",
    "override_on",
    "select_bias",
    "forced_ids",
    "per_expert_scale",
)


def _type(tensor: torch.Tensor) -> TensorType:
    dtype = {torch.bool: DType.I1, torch.int64: DType.I64}.get(tensor.dtype, DType.F32)
    shape = tuple(COUNT if size == TOKENS else size for size in tensor.shape)
    return TensorType(shape, dtype)


def _check(routing: Routing, operands: dict[str, torch.Tensor]) -> None:
    types = {name: _type(value) for name, value in operands.items()}

    def make(*arguments: object) -> RouteOp:
        given = dict(zip(types, arguments, strict=True))
        return RouteOp(given["logits"], *[given.get(name) for name in ORDER], routing=routing)  # type: ignore[arg-type]

    module = module_of(one_operation(types, make))
    with tempfile.TemporaryDirectory() as folder:
        found, _ = emit_and_run(module, operands, Path(folder))
    expected = reference(module, operands)
    assert (found["y2"] == expected["y2"]).all()
    assert (found["y0"] == expected["y0"]).all()
    assert_close(found["y1"], expected["y1"])


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(routings(), st.integers(0, 10**6), OPERANDS)
def test_equals_the_reference(routing: Routing, seed: int, operands: frozenset[str]) -> None:
    # whether rounding lets the last expert's scores reach a p of exactly 1 differs between float32 and float64
    assume(not (routing.select in (Select.TOPP, Select.ENTROPY) and routing.p == 1.0))
    inputs = make_inputs(routing, seed, operands)
    tensors = {"logits": inputs.logits}
    tensors.update({name: value for name in ORDER if (value := getattr(inputs, name)) is not None})
    single = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    _check(routing, single)


@pytest.mark.parametrize("jitter", [0.01, 0.2])
def test_sparsemixer(jitter: float) -> None:
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(3))
    logits[0] = 0.5
    logits[1, 3:6] = logits[1].max() + 1e-4
    _check(Routing(select=Select.SPARSEMIXER, k=2, jitter_eps=jitter), {"logits": logits})


def test_ties_go_to_the_lower_index() -> None:
    logits = torch.zeros(TOKENS, EXPERTS)
    logits[:, 7] = 1.0
    _check(Routing(k=4), {"logits": logits})
    _check(Routing(k=3, groups=4, topk_groups=2), {"logits": logits})


def test_more_slots_than_chosen_experts() -> None:
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(5))
    _check(Routing(k=2, k_max=5), {"logits": logits})
