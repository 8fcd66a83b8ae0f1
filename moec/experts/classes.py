"""Stored experts of a layer written anew: those of equal body and sizes form one class with stacks of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moec.dialects.builtin import WeightOp
from moec.dialects.moe import ExpertClass, ExpertsOp, Routing
from moec.experts.bodies import body_key, build_body, operands_of
from moec.experts.expert import Expert, View
from moec.experts.layer import MoeLayer
from moec.experts.parts import (
    copy_region,
    erase_unused,
    new_weight,
    settle_names,
    static_shape_of,
    store_tensor,
    tensor_of,
)
from moec.experts.router_edit import EditError, cut_router
from moec.experts.rows import one_row, rows_of, seen_through
from moec.ir import Region, TensorType, Value
from moec.weights.context import WeightContext
from moec.weights.expression import Expression, Stack
from moec.weights.expression_parser import parse_expression


@dataclass(frozen=True)
class _Row:
    """A tensor that lies in files: `stack[row]`, or all of `stack`, seen through `view`."""

    stack: Expression
    row: int | None
    view: View


@dataclass(frozen=True)
class Draft:
    """One stored expert of the layer to be: equal `key` means one class. `sources` are where its operands lie.

    An expert that stays as it is has `row` in the stacks `old` instead of sources.
    """

    key: object
    region: Region
    names: tuple[str, ...]
    kinds: tuple[TensorType, ...]
    shared: int
    protected: bool
    sources: tuple[Expression | _Row, ...] = ()
    old: tuple[Value, ...] = ()
    row: int = 0

    @staticmethod
    def of(layer: MoeLayer, expert: int) -> Draft:
        """A stored expert as it is."""
        for number, (group, stacks, region) in enumerate(layer.experts.class_operands()):
            if expert in group.experts:
                kinds = [
                    TensorType(static_shape_of(stack)[position < group.stacks :], tensor_of(stack).dtype)
                    for position, stack in enumerate(stacks)
                ]
                key = ("old", number)
                protected = expert in layer.protected
                row = group.experts.index(expert)
                return Draft(key, region, (), tuple(kinds), group.shared, protected, old=stacks, row=row)
        raise EditError(f"there is no stored expert {expert}", where=layer.name)


def draft_of(layer: MoeLayer, weights: WeightContext, number: int, expert: Expert) -> Draft:
    """Another expert in the place of the stored one `number`; its new tensors go to the store."""
    operands = operands_of(expert)
    sources: list[Expression | _Row] = []
    for operand in operands:
        known = next((item for item in expert.loaded if item.holds(operand.tensor)), None)
        if known is not None:
            sources.append(_Row(known.stack, known.row, known.view))
        else:
            sources.append(store_tensor(weights, operand.tensor, operand.dtype))
    shared = tuple(source for source, operand in zip(sources, operands, strict=True) if operand.shared)
    return Draft(
        (body_key(expert), shared),
        build_body(expert, layer.hidden_size),
        tuple(operand.name for operand in operands),
        tuple(TensorType(tuple(operand.tensor.shape), operand.dtype) for operand in operands),
        len(shared),
        number in layer.protected,
        tuple(sources),
    )


def may_share_class(layer: MoeLayer, number: int, other: Expert) -> bool:
    """Whether a stored expert might have the sizes of a new one: worth a look at its weights."""
    draft = Draft.of(layer, number)
    sizes = sum(_elements(kind.static_shape) for kind in draft.kinds)
    return sizes == sum(operand.tensor.numel() for operand in operands_of(other))


def _elements(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def rebuild(
    layer: MoeLayer,
    stored: Sequence[int],
    drafts: Sequence[Draft],
    *,
    rows: Sequence[int] | None = None,
    routing: Routing | None = None,
    shape_of: Callable[[Expression], Sequence[int]] | None = None,
) -> MoeLayer:
    """Writes the layer anew: `drafts` are its stored experts in order, `rows` the router outputs that stay."""
    router, route = layer.router, layer.route
    if rows is not None:
        router, route = cut_router(layer, rows, routing or layer.route.routing)
    members: dict[object, list[int]] = {}
    for number, draft in enumerate(drafts):
        members.setdefault(draft.key, []).append(number)
    classes, regions, operands = [], [], []
    for position, numbers in enumerate(members.values()):
        first = drafts[numbers[0]]
        operands += _stacks(layer, position, [drafts[number] for number in numbers], shape_of)
        classes.append(ExpertClass(tuple(numbers), len(first.kinds), first.shared))
        regions.append(copy_region(first.region))
    old = layer.experts
    experts = ExpertsOp(
        old.x,
        route.ids,
        route.gates,
        operands,
        regions=regions,
        stored=tuple(stored),
        classes=tuple(classes),
        protected=tuple(number for number, draft in enumerate(drafts) if draft.protected),
        location=old.location,
    )
    experts.insert_before(old)
    old.y.replace_all_uses_with(experts.y)
    erase_unused(old)
    erase_unused(layer.route)
    settle_names(experts)
    return replace(layer, route=route, experts=experts, router=router)


def _stacks(
    layer: MoeLayer,
    position: int,
    drafts: Sequence[Draft],
    shape_of: Callable[[Expression], Sequence[int]] | None,
) -> list[Value]:
    """The operands of a class."""
    first = drafts[0]
    result = []
    for index, kind in enumerate(first.kinds):
        shape = kind.static_shape
        is_shared = index >= len(first.kinds) - first.shared
        if first.old:
            value = first.old[index]
            rows = [draft.row for draft in drafts]
            if is_shared or rows == list(range(static_shape_of(value)[0])):
                result.append(value)
                continue
            weight = value.defining_op
            if not isinstance(weight, WeightOp):
                raise EditError("a stack of expert weights is computed", where=layer.name)
            source = rows_of(parse_expression(weight.source), rows, static_shape_of(value)[0])
            result.append(new_weight(layer, weight.weight_name, source, (len(rows), *shape), kind.dtype))
            continue
        sources = [draft.sources[index] for draft in drafts]
        name = f"{layer.name}.class_{position}.{first.names[index]}"
        if is_shared:
            result.append(new_weight(layer, name, _whole(sources[0], shape_of), shape, kind.dtype))
        else:
            result.append(new_weight(layer, name, _stack(sources, shape_of), (len(drafts), *shape), kind.dtype))
    return result


def _whole(source: Expression | _Row, shape_of: Callable[[Expression], Sequence[int]] | None) -> Expression:
    if isinstance(source, Expression):
        return source
    assert shape_of is not None
    inner = source.stack
    if source.row is not None:
        inner = one_row(inner, source.row, shape_of(inner)[1:])
    return seen_through(inner, source.view, 0, shape_of)


def _stack(sources: Sequence[Expression | _Row], shape_of: Callable[[Expression], Sequence[int]] | None) -> Expression:
    """One expression of all: rows of one stack stay rows of it."""
    first = sources[0]
    loaded = [source for source in sources if isinstance(source, _Row) and source.row is not None]
    if isinstance(first, _Row) and len(loaded) == len(sources):
        assert shape_of is not None
        if all((item.stack, item.view) == (first.stack, first.view) for item in loaded):
            rows = [item.row for item in loaded if item.row is not None]
            return seen_through(rows_of(first.stack, rows, shape_of(first.stack)[0]), first.view, 1, shape_of)
    return Stack(0, tuple(_whole(source, shape_of) for source in sources))
