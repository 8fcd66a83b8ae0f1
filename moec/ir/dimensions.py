"""Sizes of tensors: integers, symbols such as `batch`, and small integer expressions over them.

An expression is kept in one canonical form, a polynomial with integer coefficients whose indeterminates are symbols,
`floordiv` and `mod` terms. So `seq + past` and `past + seq` are the same object, and equality of sizes is equality of
expressions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import ClassVar

Dim = "int | DimExpr"  # the type of one size; a string so that it reads the same in annotations


# Sizes of real models have a few terms; a product of sums grows exponentially.
MAX_TERMS = 1000
MAX_NESTING = 50
MAX_NAME = 100


class DimExpr:
    """A symbolic size. Build it from `symbol("batch")` with `+ - * // %`; results that are constant come back as
    `int`."""

    __slots__ = ("_hash", "terms")
    _interned: ClassVar[dict[tuple[tuple[tuple[Atom, ...], int], ...], DimExpr]] = {}

    # ((atoms of the product, sorted), coefficient), sorted; the empty product is the constant term
    terms: tuple[tuple[tuple[Atom, ...], int], ...]
    _hash: int

    def __new__(cls, terms: tuple[tuple[tuple[Atom, ...], int], ...]) -> DimExpr:
        found = cls._interned.get(terms)
        if found is None:
            found = super().__new__(cls)
            found.terms = terms
            found._hash = hash(terms)
            cls._interned[terms] = found
        return found

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other

    def __reduce__(self) -> tuple[object, ...]:
        return (parse_dim, (str(self),))

    def __add__(self, other: int | DimExpr) -> int | DimExpr:
        return _from_terms([*self.terms, *_terms(other)])

    __radd__ = __add__

    def __neg__(self) -> int | DimExpr:
        return self * -1

    def __sub__(self, other: int | DimExpr) -> int | DimExpr:
        return self + other * -1

    def __rsub__(self, other: int | DimExpr) -> int | DimExpr:
        return self * -1 + other

    def __mul__(self, other: int | DimExpr) -> int | DimExpr:
        if isinstance(other, DimExpr) and len(self.terms) * len(other.terms) > MAX_TERMS:
            raise ValueError(f"a size has more than {MAX_TERMS} terms")
        return _from_terms(
            [
                (tuple(sorted((*left, *right), key=_atom_key)), a * b)
                for left, a in self.terms
                for right, b in _terms(other)
            ]
        )

    __rmul__ = __mul__

    def __floordiv__(self, other: int | DimExpr) -> int | DimExpr:
        return _divide("floordiv", self, other)

    def __rfloordiv__(self, other: int) -> int | DimExpr:
        return _divide("floordiv", other, self)

    def __mod__(self, other: int | DimExpr) -> int | DimExpr:
        return _divide("mod", self, other)

    def __rmod__(self, other: int) -> int | DimExpr:
        return _divide("mod", other, self)

    def symbols(self) -> set[str]:
        """Names of all symbols that the expression depends on."""
        return {name for product, _ in self.terms for atom in product for name in _atom_symbols(atom)}

    def evaluate(self, values: Mapping[str, int]) -> int:
        """The number for given symbol values; raises KeyError for a symbol without value."""
        result = self.substitute(values)
        if isinstance(result, DimExpr):
            raise KeyError(sorted(result.symbols())[0])
        return result

    def substitute(self, values: Mapping[str, int | DimExpr]) -> int | DimExpr:
        """Replaces symbols by sizes."""
        total: int | DimExpr = 0
        for product, coefficient in self.terms:
            part: int | DimExpr = coefficient
            for atom in product:
                part = part * _substitute_atom(atom, values)
            total = total + part
        return total

    def __str__(self) -> str:
        pieces: list[str] = []
        for product, coefficient in self.terms:
            factors = [_atom_text(atom) for atom in product]
            if not product or abs(coefficient) != 1:
                factors.insert(0, str(abs(coefficient)))
            sign = "-" if coefficient < 0 else "+"
            pieces.append(f"{sign} {' * '.join(factors)}")
        text = " ".join(pieces)
        return text[2:] if text.startswith("+ ") else "-" + text[2:]

    def __repr__(self) -> str:
        return f"DimExpr({self})"


# A symbol, or (kind, dividend, divisor) for floordiv and mod.
Atom = str | tuple[str, "int | DimExpr", "int | DimExpr"]


def symbol(name: str) -> DimExpr:
    """The size called `name`."""
    return DimExpr((((name,), 1),))


def _terms(value: int | DimExpr) -> tuple[tuple[tuple[Atom, ...], int], ...]:
    if isinstance(value, DimExpr):
        return value.terms
    return (((), value),) if value else ()


def _from_terms(terms: list[tuple[tuple[Atom, ...], int]]) -> int | DimExpr:
    collected: dict[tuple[Atom, ...], int] = {}
    for product, coefficient in terms:
        collected[product] = collected.get(product, 0) + coefficient
    # symbols before the constant, so that the text reads `seq + 1`
    kept = sorted(
        ((product, coefficient) for product, coefficient in collected.items() if coefficient),
        key=lambda term: (not term[0], tuple(_atom_key(atom) for atom in term[0])),
    )
    if not kept:
        return 0
    if len(kept) == 1 and not kept[0][0]:
        return kept[0][1]
    return DimExpr(tuple(kept))


def _divide(kind: str, dividend: int | DimExpr, divisor: int | DimExpr) -> int | DimExpr:
    if divisor == 0:
        raise ZeroDivisionError(f"size {dividend} divided by zero")
    if isinstance(dividend, int) and isinstance(divisor, int):
        return dividend // divisor if kind == "floordiv" else dividend % divisor
    if dividend == divisor:
        return 1 if kind == "floordiv" else 0
    if divisor == 1:
        return dividend if kind == "floordiv" else 0
    if isinstance(dividend, DimExpr):
        quotient = _exact_quotient(dividend, divisor)
        if quotient is not None:
            return quotient if kind == "floordiv" else 0
    return DimExpr(((((kind, dividend, divisor),), 1),))


def _exact_quotient(dividend: DimExpr, divisor: int | DimExpr) -> int | DimExpr | None:
    """`dividend / divisor` where the divisor is one product that divides every term, else None."""
    terms = _terms(divisor)
    if len(terms) != 1:
        return None
    divisor_product, divisor_coefficient = terms[0]
    result: list[tuple[tuple[Atom, ...], int]] = []
    for product, coefficient in dividend.terms:
        rest = list(product)
        for atom in divisor_product:
            if atom not in rest:
                return None
            rest.remove(atom)
        if coefficient % divisor_coefficient:
            return None
        result.append((tuple(rest), coefficient // divisor_coefficient))
    return _from_terms(result)


def _atom_key(atom: Atom) -> tuple[int, str]:
    return (0, atom) if isinstance(atom, str) else (1, _atom_text(atom))


def _atom_symbols(atom: Atom) -> Iterator[str]:
    if isinstance(atom, str):
        yield atom
    else:
        for side in atom[1:]:
            if isinstance(side, DimExpr):
                yield from side.symbols()


def _substitute_atom(atom: Atom, values: Mapping[str, int | DimExpr]) -> int | DimExpr:
    if isinstance(atom, str):
        return values.get(atom, DimExpr((((atom,), 1),)))
    sides = [side.substitute(values) if isinstance(side, DimExpr) else side for side in atom[1:]]
    return _divide(atom[0], sides[0], sides[1])


def _atom_text(atom: Atom) -> str:
    if isinstance(atom, str):
        return atom
    kind, dividend, divisor = atom
    return f"({_operand_text(dividend)} {kind} {_operand_text(divisor)})"


def _operand_text(value: int | DimExpr) -> str:
    if isinstance(value, int):
        return str(value) if value >= 0 else f"({value})"
    simple = len(value.terms) == 1 and len(value.terms[0][0]) == 1 and value.terms[0][1] == 1
    return str(value) if simple else f"({value})"


_DIM_TOKEN = re.compile(r"\s*(?:(\d+)|([A-Za-z_]\w*)|([-+*()]))", re.ASCII)


@lru_cache(maxsize=4096)
def parse_dim(text: str) -> int | DimExpr:
    """Reads the text form; raises ValueError where it is malformed."""
    tokens: list[str] = []
    position, depth, divisions = 0, 0, 0
    text = text.rstrip()
    while position < len(text):
        match = _DIM_TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"unexpected character {text[position]!r} in size {text[:200]!r}")
        token = match.group().strip()
        tokens.append(token)
        depth += (token == "(") - (token == ")")
        divisions += token in ("floordiv", "mod")
        position = match.end()
        if depth > MAX_NESTING or divisions > MAX_NESTING or len(tokens) > MAX_TERMS or len(token) > MAX_NAME:
            raise ValueError(f"the size {text[:200]!r} is too complex")
    value, rest = _parse_sum(tokens, 0, text)
    if rest != len(tokens):
        raise ValueError(f"unexpected {tokens[rest]!r} in size {text!r}")
    return value


def _parse_sum(tokens: list[str], at: int, text: str) -> tuple[int | DimExpr, int]:
    sign = 1
    if at < len(tokens) and tokens[at] == "-":
        sign, at = -1, at + 1
    value, at = _parse_product(tokens, at, text)
    value = value * sign
    while at < len(tokens) and tokens[at] in "+-":
        sign = 1 if tokens[at] == "+" else -1
        term, at = _parse_product(tokens, at + 1, text)
        value = value + term * sign
    return value, at


def _parse_product(tokens: list[str], at: int, text: str) -> tuple[int | DimExpr, int]:
    value, at = _parse_atom(tokens, at, text)
    while at < len(tokens) and tokens[at] in ("*", "floordiv", "mod"):
        operator = tokens[at]
        right, at = _parse_atom(tokens, at + 1, text)
        value = value * right if operator == "*" else _divide(operator, value, right)
    return value, at


def _parse_atom(tokens: list[str], at: int, text: str) -> tuple[int | DimExpr, int]:
    if at >= len(tokens):
        raise ValueError(f"size {text!r} ends early")
    token = tokens[at]
    if token == "(":
        value, at = _parse_sum(tokens, at + 1, text)
        if at >= len(tokens) or tokens[at] != ")":
            raise ValueError(f"missing ')' in size {text!r}")
        return value, at + 1
    if token.isdigit():
        return int(token), at + 1
    if token in ("floordiv", "mod") or not (token[0].isalpha() or token[0] == "_"):
        raise ValueError(f"unexpected {token!r} in size {text!r}")
    return symbol(token), at + 1
