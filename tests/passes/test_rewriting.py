"""The greedy driver and the rewriter: order, endings, refusals, and patterns that break their contract."""

from __future__ import annotations

import time

import pytest

from moec.dialects import aten
from moec.dialects.aten import AtenOp
from moec.dialects.builtin import ModuleOp
from moec.dialects.moe import YieldOp
from moec.ir import Operation, VerifyError, structural_difference, verify
from moec.pipeline import PassContext
from moec.rewrite import RewriteError, Rewriter, apply_patterns, rewrite
from tests.benchmarks.ir import large_module
from tests.passes.text import function

X = "%x: f32[4]"
CHAIN = "%a = neg.default(self=%x) -> f32[4]\nreturn %a"


def unary(op: AtenOp, name: str) -> AtenOp:
    return aten.build(name, {"self": op.operands[0]}, (op.result.type,))


@rewrite("aten.neg.default")
def neg_to_abs(op: AtenOp, rewriter: Rewriter) -> bool:
    """neg(x) ==> abs(x)"""
    rewriter.replace_with(op, unary(op, "abs.default"))
    return True


@rewrite("aten.abs.default")
def abs_to_neg(op: AtenOp, rewriter: Rewriter) -> bool:
    """abs(x) ==> neg(x)"""
    rewriter.replace_with(op, unary(op, "neg.default"))
    return True


def test_a_rewrite_and_its_report() -> None:
    module = function(X, CHAIN)
    result = apply_patterns(module, [neg_to_abs])
    assert result.changed == {"neg-to-abs": 1} and result.converged and result
    assert structural_difference(module, function(X, CHAIN.replace("neg", "abs"))) is None
    assert not apply_patterns(module, [neg_to_abs])
    assert neg_to_abs.summary == "neg(x) ==> abs(x)"


@pytest.mark.parametrize("size", [1, 300])
def test_patterns_that_undo_each_other_end_with_their_names(size: int) -> None:
    lines = [f"%v{i} = neg.default(self=%x) -> f32[4]" for i in range(size)]
    module = function(X, "\n".join([*lines, "return " + ", ".join(f"%v{i}" for i in range(size))]))
    start = time.process_time()
    result = apply_patterns(module, [neg_to_abs, abs_to_neg])
    assert not result.converged and set(result.last) == {"neg-to-abs", "abs-to-neg"}
    with pytest.raises(RewriteError, match=r"do not come to an end: .*neg") as caught:
        PassContext().rewrite(module, [neg_to_abs, abs_to_neg])
    assert "undo each other" in caught.value.hint
    assert time.process_time() - start < 20
    verify(module)


def test_a_pattern_that_matches_its_own_result_ends() -> None:
    @rewrite(AtenOp)
    def grow(op: AtenOp, rewriter: Rewriter) -> bool:
        rewriter.insert(unary(op, "neg.default"))
        op.set_operand(0, rewriter.root.prev.result)  # type: ignore[union-attr]
        return True

    result = apply_patterns(function(X, CHAIN), [grow], max_iterations=3)
    assert not result.converged and result.last == ("grow",)


def test_locations_and_order_of_insertion() -> None:
    @rewrite("aten.neg.default")
    def expand(op: AtenOp, rewriter: Rewriter) -> bool:
        first = rewriter.insert(unary(op, "abs.default"))
        second = rewriter.insert(aten.build("sqrt.default", {"self": first.result}, (op.result.type,)))
        rewriter.replace(op, second.result)
        return True

    module = function(X, CHAIN)
    neg = module.main.body.first
    assert neg is not None
    neg.location = place = neg.location.__class__(name="model.layers.3")
    apply_patterns(module, [expand])
    ops = list(module.main.body)
    assert [op.name for op in ops] == ["aten.abs.default", "aten.sqrt.default", "func.return"]
    assert [op.location for op in ops[:2]] == [place, place]


def test_benefit_then_given_order() -> None:
    fired: list[str] = []

    def pattern(name: str, benefit: int):  # type: ignore[no-untyped-def]
        def apply(op: AtenOp, rewriter: Rewriter) -> bool:
            fired.append(name)
            return False

        apply.__name__ = name
        return rewrite("aten.neg.default", benefit=benefit)(apply)

    apply_patterns(function(X, CHAIN), [pattern("low", 1), pattern("high", 5), pattern("late", 1)])
    assert fired == ["high", "low", "late"]


def test_roots() -> None:
    seen: dict[str, list[str]] = {"any": [], "class": [], "name": [], "two": []}

    @rewrite(Operation)
    def any_root(op: Operation, rewriter: Rewriter) -> bool:
        seen["any"].append(op.name)
        return False

    @rewrite(YieldOp)
    def class_root(op: YieldOp, rewriter: Rewriter) -> bool:
        seen["class"].append(op.name)
        return False

    @rewrite("moe.yield", "moe.route")
    def two_roots(op: Operation, rewriter: Rewriter) -> bool:
        seen["two"].append(op.name)
        return False

    module = large_module(10)
    apply_patterns(module, [any_root, class_root, two_roots])
    names = [op.name for op in module.walk()]
    assert seen["any"] == names[1:]  # all but the module itself, in order
    assert seen["class"] == ["moe.yield"]
    assert sorted(seen["two"]) == ["moe.route", "moe.yield"]
    with pytest.raises(TypeError):
        rewrite()


def test_users_are_visited_again() -> None:
    @rewrite("aten.abs.default")
    def through(op: AtenOp, rewriter: Rewriter) -> bool:
        """abs(neg(x)) ==> abs(x), which only holds once abs(abs(x)) is gone"""
        inner = op.operands[0].defining_op
        if inner is None or inner.name not in ("aten.neg.default", "aten.abs.default"):
            return False
        op.set_operand(0, inner.operands[0])
        rewriter.notify(op)
        return True

    depth = 50
    lines = ["%v0 = abs.default(self=%x) -> f32[4]"]
    lines += [f"%v{i} = {'neg' if i % 2 else 'abs'}.default(self=%v{i - 1}) -> f32[4]" for i in range(1, depth)]
    module = function(X, "\n".join([*lines, f"%r = abs.default(self=%v{depth - 1}) -> f32[4]", "return %r"]))
    result = apply_patterns(module, [through])
    assert result.converged
    assert [op.name for op in module.main.body] == ["aten.abs.default", "func.return"]
    assert result.erased == depth


def test_refusals_are_of_what_is_still_there_and_come_once() -> None:
    @rewrite("aten.neg.default")
    def refuse(op: AtenOp, rewriter: Rewriter) -> bool:
        return rewriter.refuse(op, "not today")

    body = "%a = neg.default(self=%x) -> f32[4]\n%b = neg.default(self=%a) -> f32[4]\n"
    module = function(X, body + "%c = abs.default(self=%b) -> f32[4]\nreturn %c")
    result = apply_patterns(module, [refuse, abs_to_neg])
    # abs became a third neg
    assert [refusal.reason for refusal in result.refusals] == ["not today"] * 3
    assert str(result.refusals[0]) == "unknown location: refuse refused aten.neg.default: not today"
    result = apply_patterns(module, [refuse, neg_to_abs])
    assert result.refusals == ()


def misbehaving(kind: str, op: AtenOp, rewriter: Rewriter) -> bool:
    if kind == "says no":
        rewriter.replace_with(op, unary(op, "abs.default"))
        return False
    if kind == "another type":
        new = rewriter.insert(aten.build("_to_copy.default", {"self": op.operands[0]}, (), dtype=op.result.type))
        rewriter.replace(op, new.results)
    if kind == "erases what is in use":
        rewriter.erase(op)
    if kind == "inserts twice":
        new = rewriter.insert(unary(op, "abs.default"))
        rewriter.insert(new)
    if kind == "inserts late":
        rewriter.replace(op, op.operands[0])
        rewriter.insert(aten.build("abs.default", {"self": rewriter.root.result}, (rewriter.root.result.type,)))
    return True


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("says no", "changed aten.neg.default but says that it did not"),
        ("another type", "replaces the results"),
        ("erases what is in use", "erases aten.neg.default, which is in use"),
        ("inserts twice", "inserts aten.abs.default twice"),
        ("inserts late", "after it erased the matched operation"),
    ],
)
def test_patterns_that_break_their_contract_are_named(kind: str, message: str) -> None:
    @rewrite("aten.neg.default")
    def broken_pattern(op: AtenOp, rewriter: Rewriter) -> bool:
        return misbehaving(kind, op, rewriter)

    with pytest.raises(RewriteError, match=message) as caught:
        apply_patterns(function(X, CHAIN), [broken_pattern])
    assert "broken-pattern" in caught.value.message


def test_dominance_survives_many_random_rewrites() -> None:
    module: ModuleOp = large_module(400)

    @rewrite("aten.add.Tensor")
    def swap(op: AtenOp, rewriter: Rewriter) -> bool:
        left, right = op.operands
        if left.defining_op is None or left.defining_op.name == "aten.neg.default":
            return False
        neg = rewriter.insert(aten.build("neg.default", {"self": left}, (left.type,)))
        new = aten.build("add.Tensor", {"self": neg.result, "other": right}, (op.result.type,))
        rewriter.replace_with(op, new)
        return True

    assert apply_patterns(module, [swap]).converged
    try:
        verify(module)
    except VerifyError as error:
        pytest.fail(str(error))
