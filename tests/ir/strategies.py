"""Random modules for hypothesis: every kind of attribute, nested regions, locations, several results."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from moec.dialects.builtin import ModuleOp
from moec.dialects.moe import ExpertClass, Normalize, Routing, Score, Select
from moec.ir import (
    UNKNOWN,
    Block,
    DenseConstant,
    DimExpr,
    DType,
    FunctionType,
    Location,
    Operation,
    Region,
    SymbolReference,
    TensorType,
    Type,
    Value,
    symbol,
)

SYMBOLS = ("batch", "seq", "past", "n_2")
# every character that UTF-8 can hold, control characters, quotes and backslashes included
texts = st.text(st.characters(codec="utf-8"), max_size=12)
names = st.from_regex(r"[a-z_][a-zA-Z0-9_$.]{0,6}", fullmatch=True) | texts.filter(bool)


def _combined(children: st.SearchStrategy[int | DimExpr]) -> st.SearchStrategy[int | DimExpr]:
    def combine(operator: str, left: int | DimExpr, right: int | DimExpr) -> int | DimExpr:
        if operator == "+":
            return left + right
        if operator == "-":
            return left - right
        if operator == "*":
            return left * right
        if right == 0:
            return left
        return left // right if operator == "//" else left % right

    return st.builds(combine, st.sampled_from(["+", "-", "*", "//", "%"]), children, children)


dimensions = st.recursive(
    st.integers(-50, 50) | st.sampled_from([symbol(name) for name in SYMBOLS]), _combined, max_leaves=5
)
sizes = st.integers(0, 2**40) | dimensions.filter(lambda size: isinstance(size, DimExpr) or size >= 0)
tensor_types = st.builds(
    TensorType, st.lists(sizes, max_size=4).map(lambda found: tuple(found)), st.sampled_from(list(DType))
)
function_types = st.recursive(
    tensor_types,
    lambda inner: st.builds(
        FunctionType, st.lists(inner, max_size=2).map(tuple), st.lists(inner, max_size=2).map(tuple)
    ),
    max_leaves=4,
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | texts
    | st.sampled_from(list(DType))
    | function_types
    | dimensions
    | st.sampled_from([*Score, *Select])
    | names.map(SymbolReference)
    | st.binary(max_size=9).map(DenseConstant)
    | st.builds(ExpertClass, st.lists(st.integers(0, 99), max_size=4).map(tuple), st.integers(0, 9), st.integers(0, 3))
    | st.builds(
        Routing,
        k=st.integers(0, 9),
        select=st.sampled_from(list(Select)),
        normalize=st.sampled_from(list(Normalize)),
        scale=st.floats(0.001, 1e300),
    )
)
attributes = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=5)
locations = st.just(UNKNOWN) | st.builds(
    Location, texts.filter(bool), st.just("") | texts.filter(bool), st.integers(0, 9999), st.integers(0, 99)
).map(lambda found: found if found.file else Location(found.name))


@st.composite
def operations(draw: st.DrawFn, visible: list[Value], depth: int) -> Operation:
    """One operation whose operands are among `visible`."""
    operands = draw(st.lists(st.sampled_from(visible), max_size=3)) if visible else []
    results: list[Type] = draw(st.lists(tensor_types, max_size=3))
    kept: dict[str, Any] = draw(st.dictionaries(names, attributes, max_size=3))
    regions = []
    for _ in range(draw(st.integers(0, 2)) if depth else 0):
        block = Block(draw(st.lists(tensor_types, max_size=2)))
        fill(draw, block, [*visible, *block.arguments], depth - 1)
        regions.append(Region(block))
    name = draw(st.sampled_from(["test.a", "test.b.c", "other.op"]))
    return Operation(name, operands, results, kept, regions, draw(locations))


def fill(draw: st.DrawFn, block: Block, visible: list[Value], depth: int) -> None:
    """Appends a few random operations."""
    for _ in range(draw(st.integers(0, 4))):
        op = draw(operations(visible, depth))
        block.append(op)
        visible.extend(op.results)


@st.composite
def modules(draw: st.DrawFn) -> ModuleOp:
    """A `builtin.module` of random operations."""
    module = ModuleOp.build()
    fill(draw, module.body, [], 2)
    return module
