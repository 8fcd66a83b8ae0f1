"""Symbolic sizes of torch as size expressions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sympy
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

from moec.errors import UnsupportedModelError
from moec.frontend.sizes import SizeTranslator
from moec.ir import DimExpr, symbol

S = sympy.Symbol("s0", integer=True, positive=True)
B = sympy.Symbol("s1", integer=True, positive=True)

LARGEST = Max(16, S, B)  # type: ignore[no-untyped-call]


def _translate(expression: Any) -> int | DimExpr:
    translator = SizeTranslator({"s0": symbol("seq"), "s1": symbol("batch")})
    return translator(SimpleNamespace(node=SimpleNamespace(expr=sympy.sympify(expression))))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "expression",
    [S, 2 * S * B + 3, S**3 - B, FloorDiv(S + 7, 8), Mod(S, 5), Min(16, S), LARGEST, Min(S, B) + Max(S, 3)],  # type: ignore[no-untyped-call]
)
def test_same_numbers(expression: Any) -> None:
    translated = _translate(expression)
    for seq in (1, 2, 7, 15, 16, 17, 40):
        for batch in (1, 3, 64):
            values = {"seq": seq, "batch": batch}
            found = translated.evaluate(values) if isinstance(translated, DimExpr) else translated
            assert found == int(expression.subs({S: seq, B: batch}))


def test_chunk_of_a_padded_sequence_is_a_number() -> None:
    padded = S + Mod(64 - Mod(S, 64), 64)
    assert _translate(FloorDiv(padded, FloorDiv(padded, 64))) == 64


def test_a_quotient_that_only_looks_like_a_chunk() -> None:
    assert isinstance(_translate(FloorDiv(S + 1, FloorDiv(S + 1, 64))), DimExpr)


@pytest.mark.parametrize("expression", [sympy.Symbol("u0"), sympy.sqrt(S), S / 2])
def test_no_form(expression: Any) -> None:
    with pytest.raises(UnsupportedModelError):
        _translate(expression)
