"""Edits of a layer with experts: the only code that drops, reorders, shares or replaces experts.

Router rows, biases and scales per expert, slots and stacks of weights move together, and experts of equal body and
sizes form one class. Each edit gives the new `MoeLayer`; the old one is no longer valid. Weights that nobody reads any
more are left for `dce`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moec.dialects import aten
from moec.dialects.aten import AtenOp
from moec.dialects.builtin import ConstantOp, WeightOp
from moec.dialects.moe import ExpertClass, ExpertsOp, RouteOp, Routing, Select
from moec.errors import UsageError
from moec.experts.bodies import body_key, build_body, operands_of
from moec.experts.expert import Expert, View
from moec.experts.layer import MoeLayer
from moec.experts.parts import (
    copy_region,
    erase_unused,
    logits_behind,
    new_weight,
    route_with,
    settle_names,
    static_shape_of,
    store_tensor,
    tensor_of,
)
from moec.experts.reading import load_expert
from moec.experts.rows import one_row, rows_of, seen_through
from moec.ir import DenseConstant, Region, TensorType, Value
from moec.weights.context import WeightContext
from moec.weights.expression import Expression, Stack
from moec.weights.expression_parser import parse_expression


class EditError(UsageError):
    """An edit that a layer does not allow."""


def slice_experts(layer: MoeLayer, keep: Sequence[int]) -> MoeLayer:
    """Keeps the router outputs `keep`, in this order; stored experts that none of them names are dropped.

    Tokens choose again among what is left. Raises EditError where fewer than k outputs would stay, where groups of
    experts would differ in size, or where something per expert is not a weight that can be cut.
    """
    chosen = list(keep)
    if len(set(chosen)) != len(chosen) or not all(0 <= output < layer.outputs for output in chosen):
        raise EditError(f"the outputs to keep {chosen} do not fit a router with {layer.outputs}", where=layer.name)
    if chosen == list(range(layer.outputs)):
        return layer
    routing = _routing_of(layer, chosen)
    stored, kept = _renumber([layer.stored[output] for output in chosen])
    if not kept:
        raise EditError("no stored expert would be left", where=layer.name)
    return _rebuild(layer, stored, [_Draft.of(layer, expert) for expert in kept], rows=chosen, routing=routing)


def permute_experts(layer: MoeLayer, order: Sequence[int]) -> MoeLayer:
    """Router output i becomes what `order[i]` was; the stored experts keep their numbers."""
    if sorted(order) != list(range(layer.outputs)):
        raise EditError(f"{list(order)} is no order of {layer.outputs} router outputs", where=layer.name)
    if list(order) == list(range(layer.outputs)):
        return layer
    if layer.route.routing.groups > 1 or layer.route.routing.null_experts:
        raise EditError("outputs of a router with groups or empty outputs cannot change places", where=layer.name)
    stored, kept = _renumber([layer.stored[output] for output in order])
    return _rebuild(layer, stored, [_Draft.of(layer, expert) for expert in kept], rows=list(order))


def alias_experts(layer: MoeLayer, stored: Sequence[int]) -> MoeLayer:
    """Sends each router output to the stored expert that `stored` says, -1 for none; orphans are dropped.

    Raises EditError for a table that does not fit, or that leaves no expert.
    """
    if len(stored) != layer.outputs or not all(-1 <= expert < layer.expert_count for expert in stored):
        raise EditError(f"the table {list(stored)} does not fit {layer.expert_count} experts", where=layer.name)
    table, kept = _renumber(stored)
    if not kept:
        raise EditError("no stored expert would be left", where=layer.name)
    return _rebuild(layer, table, [_Draft.of(layer, expert) for expert in kept])


def replace_experts(layer: MoeLayer, weights: WeightContext, new: Mapping[int, Expert]) -> MoeLayer:
    """Puts other experts in the place of stored ones; their new tensors go to the store of `weights`.

    Experts that are not named keep their weights as they are in files. Raises EditError for an expert that is not
    there or has another hidden size, UsageError where there is no store.
    """
    if not new:
        return layer
    unknown = sorted(set(new) - set(range(layer.expert_count)))
    if unknown:
        raise EditError(f"there is no stored expert {unknown[0]} to replace", where=layer.name)
    drafts = []
    for number in range(layer.expert_count):
        expert = new.get(number)
        if expert is None and any(_may_share_class(layer, number, other) for other in new.values()):
            # in the canonical form, so that it can be in one class with the new ones
            expert = load_expert(layer, weights, number)
        drafts.append(_Draft.of(layer, number) if expert is None else _draft(layer, weights, number, expert))
    return _rebuild(layer, layer.stored, drafts, shape_of=lambda source: weights.shape_dtype(source)[0])


def replace_router(
    layer: MoeLayer, weights: WeightContext, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> MoeLayer:
    """Gives the router another weight [R, H] and bias [R], which go to the store of `weights`; R stays.

    Raises EditError for other shapes, UsageError where there is no store.
    """
    if tuple(weight.shape) != static_shape_of(layer.router.tensor("weight")) or (
        bias is not None and tuple(bias.shape) != (layer.outputs,)
    ):
        raise EditError(f"a router weight of shape {list(weight.shape)} does not fit", where=layer.name)
    tensors: dict[str, Value | tuple[Value, ...]] = {"input": layer.router.tensor("input")}
    tensors["weight"] = new_weight(layer, f"{layer.name}.router.weight", store_tensor(weights, weight), weight.shape)
    if bias is not None:
        tensors["bias"] = new_weight(layer, f"{layer.name}.router.bias", store_tensor(weights, bias), bias.shape)
    router = aten.build("linear.default", tensors, (layer.router.result.type,), layer.router.location)
    router.insert_before(layer.router)
    layer.router.result.replace_all_uses_with(router.result)
    erase_unused(layer.router)
    settle_names(layer.experts)
    return replace(layer, router=router)


def replace_routing(layer: MoeLayer, routing: Routing) -> MoeLayer:
    """Gives the route other stages, above all another number of choices; tensors stay.

    Raises EditError for stages that do not fit the number of router outputs.
    """
    if routing == layer.route.routing:
        return layer
    problem = routing.problem(layer.outputs)
    if problem is not None:
        raise EditError(f"this router cannot choose so: {problem}", where=layer.name)
    old = layer.route
    route = route_with(old, routing)
    route.insert_before(old)
    before = layer.experts
    experts = ExpertsOp(
        before.x,
        route.ids,
        route.gates,
        before.weights,
        regions=[copy_region(region) for region in before.regions],
        stored=before.stored,
        classes=before.classes,
        protected=before.protected,
        location=before.location,
    )
    experts.insert_before(before)
    before.y.replace_all_uses_with(experts.y)
    old.count.replace_all_uses_with(route.count)
    erase_unused(before)
    erase_unused(old)
    return replace(layer, route=route, experts=experts)


def protect_experts(layer: MoeLayer, experts: Iterable[int]) -> MoeLayer:
    """Marks stored experts, besides those that are marked, as not to be changed or dropped."""
    layer.experts.protected = tuple(sorted(layer.protected | set(experts)))
    return layer


# -- classes --------------------


@dataclass(frozen=True)
class _Row:
    """A tensor that lies in files: `stack[row]`, or all of `stack`, seen through `view`."""

    stack: Expression
    row: int | None
    view: View


@dataclass(frozen=True)
class _Draft:
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
    def of(layer: MoeLayer, expert: int) -> _Draft:
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
                return _Draft(key, region, (), tuple(kinds), group.shared, protected, old=stacks, row=row)
        raise EditError(f"there is no stored expert {expert}", where=layer.name)


def _draft(layer: MoeLayer, weights: WeightContext, number: int, expert: Expert) -> _Draft:
    operands = operands_of(expert)
    sources: list[Expression | _Row] = []
    for operand in operands:
        known = next((item for item in expert.loaded if item.holds(operand.tensor)), None)
        if known is not None:
            sources.append(_Row(known.stack, known.row, known.view))
        else:
            sources.append(store_tensor(weights, operand.tensor, operand.dtype))
    shared = tuple(source for source, operand in zip(sources, operands, strict=True) if operand.shared)
    return _Draft(
        (body_key(expert), shared),
        build_body(expert, layer.hidden_size),
        tuple(operand.name for operand in operands),
        tuple(TensorType(tuple(operand.tensor.shape), operand.dtype) for operand in operands),
        len(shared),
        number in layer.protected,
        tuple(sources),
    )


def _may_share_class(layer: MoeLayer, number: int, other: Expert) -> bool:
    """Whether a stored expert might have the sizes of a new one: worth a look at its weights."""
    draft = _Draft.of(layer, number)
    sizes = sum(_elements(kind.static_shape) for kind in draft.kinds)
    return sizes == sum(operand.tensor.numel() for operand in operands_of(other))


def _elements(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _rebuild(
    layer: MoeLayer,
    stored: Sequence[int],
    drafts: Sequence[_Draft],
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
    drafts: Sequence[_Draft],
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


# -- router --------------------


def _routing_of(layer: MoeLayer, keep: Sequence[int]) -> Routing:
    """The routing among fewer outputs; raises EditError."""
    routing: Routing = layer.route.routing
    if routing.groups > 1:
        size = layer.outputs // routing.groups
        counts = [sum(output // size == group for output in keep) for group in range(routing.groups)]
        ordered = [output // size for output in keep]
        if len(set(counts)) > 1 or ordered != sorted(ordered):
            raise EditError(
                f"the router chooses among {routing.groups} groups of equal size; {counts} outputs of them would stay",
                where=layer.name,
                hint="keep equally many experts of each group",
            )
    if routing.null_experts:
        nulls = set(range(layer.outputs - routing.null_experts, layer.outputs))
        left = [output for output in keep if output in nulls]
        if [output in nulls for output in keep] != sorted(output in nulls for output in keep):
            raise EditError("the outputs without experts must stay the last ones", where=layer.name)
        routing = replace(routing, null_experts=len(left))
    if routing.select in (Select.ENTROPY,) and routing.k_max:
        routing = replace(routing, k_max=len(keep))
    problem = routing.problem(len(keep))
    if problem is not None:
        raise EditError(
            f"{len(keep)} of {layer.outputs} router outputs cannot be kept: {problem}",
            where=layer.name,
            hint=f"a token chooses {routing.k}; keep at least as many",
        )
    return routing


def cut_router(layer: MoeLayer, rows: Sequence[int], routing: Routing) -> tuple[AtenOp, RouteOp]:
    """Router and route for the outputs `rows`."""
    old = layer.route
    if old.score_override is not None or old.forced_ids is not None:
        raise EditError("a route with forced choices cannot lose or move experts", where=layer.name)
    tensors: dict[str, Value | tuple[Value, ...]] = {"input": layer.router.tensor("input")}
    tensors["weight"] = _rows_of_value(layer, layer.router.tensor("weight"), rows)
    for bias in layer.router.tensors("bias"):
        tensors["bias"] = _rows_of_value(layer, bias, rows)
    kind = tensor_of(layer.router.result)
    router = aten.build(
        "linear.default", tensors, (TensorType((*kind.shape[:-1], len(rows)), kind.dtype),), layer.router.location
    )
    router.insert_before(layer.router)
    logits = logits_behind(layer, router.result, len(rows))
    pieces = [
        None if value is None else _rows_of_value(layer, value, rows)
        for value in (old.logit_bias, old.mask, old.select_bias, old.per_expert_scale)
    ]
    route = RouteOp(
        logits,
        pieces[0],
        pieces[1],
        None,
        None,
        pieces[2],
        None,
        pieces[3],
        routing=routing,
        location=old.location,
    )
    route.insert_before(old)
    if old.count.uses:
        old.count.replace_all_uses_with(route.count)
    return router, route


def _rows_of_value(layer: MoeLayer, value: Value, rows: Sequence[int]) -> Value:
    """Entries `rows` along dimension 0 of a weight or a constant; raises EditError for anything that is computed."""
    op = value.defining_op
    shape = tensor_of(value).shape
    if isinstance(op, WeightOp) and shape[0] == layer.outputs:
        source = rows_of(parse_expression(op.source), rows, layer.outputs)
        return new_weight(
            layer, op.weight_name, source, (len(rows), *static_shape_of(value)[1:]), tensor_of(value).dtype
        )
    if isinstance(op, ConstantOp) and shape[0] == layer.outputs:
        kind = tensor_of(value)
        step = len(op.data.data) // layer.outputs
        data = b"".join(op.data.data[row * step : (row + 1) * step] for row in rows)
        constant = ConstantOp(
            data=DenseConstant(data),
            result_types=[TensorType((len(rows), *kind.shape[1:]), kind.dtype)],
            location=op.location,
        )
        constant.insert_before(layer.router)
        return constant.value
    raise EditError(
        f"a value per expert of its router is computed by {op.name if op is not None else 'the caller'}",
        where=layer.name,
        hint="only weights and constants can be cut; `canonicalize` folds more into weights",
    )


def _renumber(stored: Sequence[int]) -> tuple[list[int], list[int]]:
    """(table with stored experts numbered by ascending old number, the old numbers that are left)."""
    kept = sorted({expert for expert in stored if expert >= 0})
    numbers = {expert: number for number, expert in enumerate(kept)}
    return [numbers.get(expert, -1) for expert in stored], kept
