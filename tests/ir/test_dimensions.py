"""The algebra of sizes: against Python's integers, and one object for one expression."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moec.ir import DimExpr, symbol
from moec.ir.dimensions import parse_dim
from tests.ir.strategies import SYMBOLS, dimensions

FAST = settings(max_examples=300, deadline=None)
values = st.fixed_dictionaries({name: st.integers(1, 40) for name in SYMBOLS})


def number(size: int | DimExpr, given_values: dict[str, int]) -> int:
    return size.evaluate(given_values) if isinstance(size, DimExpr) else size


def numbers(given_values: dict[str, int], *found: int | DimExpr) -> list[int]:
    """The sizes as numbers; a case that divides by zero proves nothing."""
    try:
        return [number(size, given_values) for size in found]
    except ZeroDivisionError:
        assume(False)
        raise


@FAST
@given(dimensions, dimensions, values)
def test_operations_agree_with_integers(left: int | DimExpr, right: int | DimExpr, at: dict[str, int]) -> None:
    a, b = numbers(at, left, right)
    assert number(left + right, at) == a + b
    assert number(left - right, at) == a - b
    assert number(left * right, at) == a * b
    if right != 0 and b != 0:
        assert number(left // right, at) == a // b
        assert number(left % right, at) == a % b


@FAST
@given(dimensions, dimensions, dimensions)
def test_ring_laws_hold_as_identity(a: int | DimExpr, b: int | DimExpr, c: int | DimExpr) -> None:
    assert a + b == b + a
    assert a * b == b * a
    assert (a + b) + c == a + (b + c)
    assert (a * b) * c == a * (b * c)
    assert a * (b + c) == a * b + a * c
    assert a - a == 0 and a + 0 == a and a * 1 == a and a * 0 == 0


@FAST
@given(dimensions)
def test_text_reads_back_to_the_same_object(size: int | DimExpr) -> None:
    assert parse_dim(str(size)) is size or parse_dim(str(size)) == size
    if isinstance(size, DimExpr):
        assert pickle.loads(pickle.dumps(size)) is size


@FAST
@given(dimensions, dimensions, values)
def test_substitution_commutes_with_evaluation(size: int | DimExpr, inner: int | DimExpr, at: dict[str, int]) -> None:
    assume(isinstance(size, DimExpr))
    assert isinstance(size, DimExpr)
    try:
        replaced = size.substitute({"seq": inner})
    except ZeroDivisionError:
        assume(False)
        raise
    [inside] = numbers(at, inner)
    left, right = numbers(at, replaced), numbers({**at, "seq": inside}, size)
    assert left == right


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("past + seq", "past + seq"),
        ("seq + past", "past + seq"),
        ("2 * (batch + 1) - 2", "2 * batch"),
        ("(batch * seq) floordiv seq", "batch"),
        ("(batch * 6) mod 3", "0"),
        ("(seq + 7) floordiv 8", "((seq + 7) floordiv 8)"),
        ("-seq + 1", "-seq + 1"),
        ("seq mod seq", "0"),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    assert str(parse_dim(text)) == canonical


@pytest.mark.parametrize(
    "text",
    ["", "seq +", "(seq", "seq)", "seq seq", "1 ? 2", "floordiv 2", "(" * 1000 + "1" + ")" * 1000, "9" * 5000,
     "seq mod " * 60 + "2", "+".join(["a"] * 2000), " * ".join(["(a+b+c+d+e+f)"] * 30)],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_malformed_or_excessive(text: str) -> None:
    with pytest.raises(ValueError):
        parse_dim(text)


def test_division_by_zero_and_unknown_symbols() -> None:
    seq = symbol("seq")
    with pytest.raises(ZeroDivisionError):
        seq // 0
    with pytest.raises(ZeroDivisionError):
        parse_dim("seq mod 0")
    with pytest.raises(KeyError, match="seq"):
        (seq + symbol("past")).evaluate({"past": 1})  # type: ignore[union-attr]
