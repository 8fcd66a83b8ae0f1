"""The graph, its text and its verifier on a hand-built MoE layer."""

from __future__ import annotations

import pytest

from moec.dialects.moe import ExpertsOp, RouteOp, Routing
from moec.ir import VerifyError, parse_module, print_operation, structurally_equal, verify
from moec.ir.parser import ParseError
from tests.ir.build import moe_module


def test_text_round_trip() -> None:
    module = moe_module()
    verify(module)
    text = print_operation(module)
    again = parse_module(text)
    verify(again)
    assert print_operation(again) == text
    assert structurally_equal(module, again)


def test_clone_is_equal_and_independent() -> None:
    module = moe_module()
    copy = module.clone()
    verify(copy)
    assert structurally_equal(module, copy)
    route = next(op for op in copy.walk() if isinstance(op, RouteOp))
    route.routing = Routing(k=2)
    assert not structurally_equal(module, copy)


def test_typed_access() -> None:
    experts = next(op for op in moe_module().walk() if isinstance(op, ExpertsOp))
    [(group, stacks, region)] = experts.class_operands()
    assert group.experts == tuple(range(8)) and len(stacks) == 2
    assert [op.name for op in region.block][-1] == "moe.yield"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("k = 2", "k = 9"),
        ("stored = [0, 1", "stored = [9, 1"),
        ("operands = 2", "operands = 1"),
        ("tensor<96x64xf32>, %", "tensor<95x64xf32>, %"),
    ],
)
def test_broken_text_is_refused(change: str, message: str) -> None:
    text = print_operation(moe_module())
    assert change in text
    with pytest.raises((VerifyError, ParseError)):
        verify(parse_module(text.replace(change, message)))
