"""Values of size symbols, found from the shapes of the inputs."""

from __future__ import annotations

from collections.abc import Sequence

from moec.errors import UsageError
from moec.ir import DimExpr, TensorType


def bind_symbols(inputs: Sequence[tuple[str, TensorType, Sequence[int]]]) -> dict[str, int]:
    """The value of every symbol in the types of the inputs, given as (name, type, actual shape).

    Solves sizes such as `past + seq` once all but one of their symbols are known. Where nothing but a product such as
    `batch * seq` is known, all factors but the last are 1.
    Raises UsageError where ranks or sizes contradict each other, or where a symbol stays open.
    """
    symbols: dict[str, int] = {}
    open_sizes: list[tuple[str, int, DimExpr, int]] = []
    for name, kind, shape in inputs:
        if len(shape) != kind.rank:
            raise UsageError(f"the input {name} has shape {list(shape)}", hint=f"the model takes {kind}")
        for axis, (size, actual) in enumerate(zip(kind.shape, shape, strict=True)):
            if isinstance(size, DimExpr):
                open_sizes.append((name, axis, size, actual))
            else:
                _check(name, axis, size, size, actual)
    while open_sizes:
        remaining = []
        for name, axis, size, actual in open_sizes:
            known = size.substitute(symbols)
            if isinstance(known, int):
                _check(name, axis, size, known, actual)
            elif not _solve(known, actual, symbols, name, axis):
                remaining.append((name, axis, size, actual))
        if len(remaining) == len(open_sizes) and not _solve_product(remaining, symbols):
            name, axis, size, _ = remaining[0]
            raise UsageError(f"the sizes do not determine {size}", where=f"axis {axis} of the input {name}")
        open_sizes = remaining
    return symbols


def _check(name: str, axis: int, size: int | DimExpr, expected: int, actual: int) -> None:
    if expected != actual:
        what = f"{size} = {expected}" if isinstance(size, DimExpr) else str(size)
        raise UsageError(f"the input {name} has size {actual} where {what} is due", where=f"axis {axis}")


def _solve(size: DimExpr, actual: int, symbols: dict[str, int], name: str, axis: int) -> bool:
    """Sets the symbol of `factor * symbol + constant = actual`; False where the size has another form."""
    factor, constant, unknown = 0, 0, ""
    for product, coefficient in size.terms:
        if not product:
            constant = coefficient
        elif len(product) == 1 and isinstance(product[0], str) and not unknown:
            factor, unknown = coefficient, product[0]
        else:
            return False
    value, remainder = divmod(actual - constant, factor)
    if remainder or value < 0:
        raise UsageError(f"the input {name} has size {actual}, which {size} cannot be", where=f"axis {axis}")
    symbols[unknown] = value
    return True


def _solve_product(sizes: list[tuple[str, int, DimExpr, int]], symbols: dict[str, int]) -> bool:
    """Sets one factor of the first size that is a product of symbols to 1; False where there is none."""
    for _, _, size, _ in sizes:
        known = size.substitute(symbols)
        if isinstance(known, DimExpr) and len(known.terms) == 1 and len(known.symbols()) > 1:
            symbols[min(known.symbols())] = 1
            return True
    return False
