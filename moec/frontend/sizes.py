"""Symbolic sizes of torch as size expressions of the IR."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import sympy
import torch
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Max, Min, Mod, PythonMod

from moec.errors import UnsupportedModelError
from moec.ir.dimensions import DimExpr

_LARGEST_CHUNK = 1024


class SizeTranslator:
    """Translates torch's symbols by a table from their names to sizes of the IR."""

    def __init__(self, symbols: Mapping[str, int | DimExpr]) -> None:
        self._symbols = symbols
        self._known: dict[sympy.Expr, int | DimExpr] = {}

    def __call__(self, size: int | torch.SymInt) -> int | DimExpr:
        """The IR's form of a size; raises UnsupportedModelError where it depends on data or has no such form."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression not in self._known:
            self._known[expression] = self._translate(expression)
        return self._known[expression]

    def _translate(self, expression: sympy.Expr) -> int | DimExpr:
        match expression:
            case sympy.Integer():
                return int(expression)
            case sympy.Symbol():
                if expression.name not in self._symbols:
                    raise UnsupportedModelError(f"a size depends on the data ({expression.name})")
                return self._symbols[expression.name]
            case sympy.Add():
                total: int | DimExpr = 0
                for term in expression.args:
                    total = total + self._translate(term)
                return total
            case sympy.Mul():
                product: int | DimExpr = 1
                for factor in expression.args:
                    product = product * self._translate(factor)
                return product
            case sympy.Pow() if expression.exp.is_Integer and int(expression.exp) > 0:
                base, power = self._translate(expression.base), 1
                for _ in range(int(expression.exp)):
                    power = power * base  # type: ignore[assignment]
                return power
            case FloorDiv() if (chunk := _chunk_size(expression)) is not None:
                return chunk
            case FloorDiv() | CleanDiv():
                return self._translate(expression.args[0]) // self._translate(expression.args[1])
            case Mod() | PythonMod():
                return self._translate(expression.args[0]) % self._translate(expression.args[1])
            case Min() | sympy.Min():
                return functools.reduce(_minimum, map(self._translate, expression.args))
            case Max() | sympy.Max():
                return functools.reduce(_maximum, map(self._translate, expression.args))
        raise UnsupportedModelError(f"the size {expression} cannot be expressed with + - * // %")


def _minimum(left: int | DimExpr, right: int | DimExpr) -> int | DimExpr:
    """The smaller of two positive sizes in + - * //: `1 // (1 + left // right)` is 1 where left < right, else 0."""
    if isinstance(left, int) and isinstance(right, int):
        return min(left, right)
    is_less = 1 // (1 + left // right)
    return right + is_less * (left - right)


def _maximum(left: int | DimExpr, right: int | DimExpr) -> int | DimExpr:
    return left + right - _minimum(left, right)


def _chunk_size(expression: FloorDiv) -> int | None:
    """c for `a // (a // c)` where c divides a for all sizes: the length of a chunk of a padded sequence."""
    whole, count = expression.args
    if not isinstance(count, FloorDiv) or count.args[0] != whole or not isinstance(count.args[1], sympy.Integer):
        return None
    chunk = int(count.args[1])
    symbols = sorted(whole.free_symbols, key=str)
    if len(symbols) != 1 or not 0 < chunk <= _LARGEST_CHUNK:
        return None
    # Remainders by `chunk` of sums and products repeat with period `chunk`; two periods are tried.
    values = (whole.subs(symbols[0], size) for size in range(1, 2 * chunk + 1))
    return chunk if all(int(value) % chunk == 0 for value in values) else None
