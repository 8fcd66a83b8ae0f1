"""Common subexpressions and dead code: regions, constants, attributes, and what must stay."""

from __future__ import annotations

import pytest

from moec.dialects.builtin import ConstantOp, FuncOp, ModuleOp, WeightOp
from moec.dialects.nn import MLPOp
from moec.ir import DenseConstant, DType, TensorType, Value, print_operation, verify
from tests.benchmarks.ir import large_module
from tests.ir.build import EXPERTS, HIDDEN, WIDTH, f32, swiglu_body
from tests.passes.text import assert_becomes, function, run

X = "%x: f32[4]"

MERGES = {
    "chains": (
        """%a = neg.default(self=%x) -> f32[4]
        %b = neg.default(self=%x) -> f32[4]
        %c = abs.default(self=%a) -> f32[4]
        %d = abs.default(self=%b) -> f32[4]
        %e = add.Tensor(self=%c, other=%d) -> f32[4]
        return %e""",
        """%a = neg.default(self=%x) -> f32[4]
        %c = abs.default(self=%a) -> f32[4]
        %e = add.Tensor(self=%c, other=%c) -> f32[4]
        return %e""",
    ),
    "several results": (
        """%a, %b = split.Tensor(self=%x, split_size=2) -> (f32[2], f32[2])
        %c, %d = split.Tensor(self=%x, split_size=2) -> (f32[2], f32[2])
        return %a, %d""",
        """%a, %b = split.Tensor(self=%x, split_size=2) -> (f32[2], f32[2])
        return %a, %b""",
    ),
}
STAYS = {
    "another attribute": """%a = mul.Tensor(self=%x, other=2.0) -> f32[4]
        %b = mul.Tensor(self=%x, other=3.0) -> f32[4]
        return %a, %b""",
    "an integer, a float and a boolean": """%a = mul.Tensor(self=%x, other=1) -> f32[4]
        %b = mul.Tensor(self=%x, other=1.0) -> f32[4]
        %c = mul.Tensor(self=%x, other=true) -> f32[4]
        return %a, %b, %c""",
    "both zeros": """%a = mul.Tensor(self=%x, other=0.0) -> f32[4]
        %b = mul.Tensor(self=%x, other=-0.0) -> f32[4]
        return %a, %b""",
    "swapped operands": """%a = neg.default(self=%x) -> f32[4]
        %b = sub.Tensor(self=%x, other=%a) -> f32[4]
        %c = sub.Tensor(self=%a, other=%x) -> f32[4]
        return %b, %c""",
    "another type": """%a = _to_copy.default(self=%x, dtype=f16) -> f16[4]
        %b = _to_copy.default(self=%x, dtype=f64) -> f64[4]
        return %a, %b""",
    "random numbers": """%a = rand_like.default(self=%x) -> f32[4]
        %b = rand_like.default(self=%x) -> f32[4]
        %c = bernoulli.default(self=%x) -> f32[4]
        %d = bernoulli.default(self=%x) -> f32[4]
        %e = dropout.default(input=%x, p=0.5, train=true) -> f32[4]
        %f = dropout.default(input=%x, p=0.5, train=true) -> f32[4]
        return %a, %b, %c, %d, %e, %f""",
}


@pytest.mark.parametrize("name", MERGES)
def test_cse_merges(name: str) -> None:
    before, expected = MERGES[name]
    assert_becomes(function(X, before), "cse", function(X, expected))


@pytest.mark.parametrize("name", STAYS)
def test_cse_leaves(name: str) -> None:
    report = assert_becomes(function(X, STAYS[name]), "cse", function(X, STAYS[name]))
    assert report.records[0].statistics == {"merged": 0}


def mlp_module(widths: tuple[int, int], constants: tuple[bytes, bytes]) -> ModuleOp:
    """Two feed-forward blocks on the same input, and two constants."""
    main = FuncOp.build("main", [f32(5, HIDDEN)])
    results: list[Value] = []
    weights = {}
    for width in sorted(set(widths)):
        for name, shape in (("up", (2 * width, HIDDEN)), ("down", (HIDDEN, width))):
            op = WeightOp(result_types=[f32(*shape)], weight_name=f"{name}{width}", source=f"{name}{width}")
            main.body.append(op)
            weights[name, width] = op.value
    for width in widths:
        stacks = [weights["up", width], weights["down", width]]
        op = MLPOp(main.arguments[0], stacks, regions=[swiglu_body(HIDDEN, width)])
        main.body.append(op)
        results.append(op.y)
    for data in constants:
        constant = ConstantOp(result_types=[TensorType((1,), DType.F32)], data=DenseConstant(data))
        main.body.append(constant)
        results.append(constant.value)
    main.finish(results)
    module = ModuleOp.build([main])
    verify(module)
    return module


@pytest.mark.parametrize(("widths", "merged"), [((WIDTH, WIDTH), 1), ((WIDTH, 2 * WIDTH), 0)])
def test_cse_compares_regions(widths: tuple[int, int], merged: int) -> None:
    module = mlp_module(widths, (b"\0\0\0\0", b"\0\0\0\1"))
    assert run(module, "cse").records[0].statistics == {"merged": merged}


def test_cse_compares_one_attribute_inside_a_region() -> None:
    module = mlp_module((WIDTH, WIDTH), (b"\0\0\0\0", b"\0\0\0\1"))
    chunk = [op for op in module.walk() if op.name == "aten.chunk.default"][1]
    chunk.attributes["dim"] = 1
    assert run(module, "cse").records[0].statistics == {"merged": 0}


def test_cse_compares_constants() -> None:
    module = mlp_module((WIDTH, 2 * WIDTH), (b"\0\0\0\1", b"\0\0\0\1"))
    assert run(module, "cse").records[0].statistics == {"merged": 1}


def test_cse_keeps_the_bodies_of_experts_closed() -> None:
    module = mlp_module((WIDTH, 2 * WIDTH), (b"\0\0\0\0", b"\0\0\0\1"))
    blocks = [op for op in module.walk() if isinstance(op, MLPOp)]
    zero = next(op for op in module.walk() if isinstance(op, ConstantOp))
    zero.detach()
    zero.insert_before(blocks[0])
    for mlp in blocks:
        body = mlp.regions[0].block
        assert body.first is not None
        copy = zero.clone()
        copy.insert_before(body.first)
        last = body.terminator
        scaled = body.terminator.prev
        assert scaled is not None
        shift = type(scaled).create(
            "aten.add.Tensor", [last.operands[0], copy.result], [last.operands[0].type],
            {"operand_layout": ("self", "other")},
        )  # fmt: skip
        shift.insert_before(last)
        last.set_operands([shift.result])
    verify(module)
    run(module, "cse")
    for mlp in blocks:
        assert any(isinstance(op, ConstantOp) for op in mlp.regions[0].block)


def test_dce_in_regions_and_arguments_stay() -> None:
    module = mlp_module((WIDTH, WIDTH), (b"\0\0\0\0", b"\0\0\0\1"))
    body = next(op for op in module.walk() if isinstance(op, MLPOp)).regions[0].block
    assert body.first is not None
    for op in [body.first.clone(dict.fromkeys([])), body.first.clone()]:
        op.insert_before(body.terminator)
    main = module.main
    *_, last = main.return_op.operands
    main.return_op.set_operands(main.return_op.operands[:1])
    main.update_type()
    arguments = len(main.arguments), len(body.arguments)
    report = run(module, "func.func(dce)")
    # two clones in the body; the second block with its body of 6; two constants
    assert report.records[0].statistics == {"erased": 2 + 7 + 2}
    assert (len(main.arguments), len(body.arguments)) == arguments
    assert not last.uses


def test_passes_are_exact_on_layers_and_repeat_the_same() -> None:
    first, second = large_module(200), large_module(200)
    run(first, "canonicalize,cse,dce")
    run(second, "canonicalize,cse,dce")
    assert print_operation(first) == print_operation(second)
    experts = [op for op in first.walk() if op.name == "moe.experts"]
    assert len(experts) == len([op for op in large_module(200).walk() if op.name == "moe.experts"])
    assert all(len(op.attributes["stored"]) == EXPERTS for op in experts)
