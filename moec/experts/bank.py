"""Experts of several layers in one layer: a bank that layers share, and router outputs for experts of other layers.

Layers share an expert by reading equal weight expressions, which are stored once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from moec.dialects import aten
from moec.dialects.builtin import ConstantOp, WeightOp
from moec.dialects.moe import BiasUnit, ExpertClass, ExpertsOp, RouteOp, Select
from moec.experts.edit import EditError
from moec.experts.layer import MoeLayer
from moec.experts.parts import (
    copy_region,
    erase_unused,
    logits_behind,
    new_weight,
    settle_names,
    static_shape_of,
    store_tensor,
    tensor_of,
)
from moec.experts.rows import rows_of
from moec.ir import DenseConstant, DType, Region, TensorType, Value
from moec.weights.context import WeightContext
from moec.weights.expression import Concat, Expression
from moec.weights.expression_parser import parse_expression


@dataclass(frozen=True)
class BankExpert:
    """The stored expert `expert` of the layer at `layer` in a group of layers."""

    layer: int
    expert: int


def share_experts(
    group: Sequence[MoeLayer], used: Sequence[Sequence[BankExpert]], stored: Sequence[Sequence[int]]
) -> tuple[MoeLayer, ...]:
    """Gives each layer the experts `used[layer]` of the whole group as its stored ones, and the table `stored[layer]`.

    What several layers use is one class of experts in each of them, with equal weights. A protected expert is protected
    wherever it is used. Raises EditError where layers differ in their hidden size or where weights are computed.
    """
    if len({layer.hidden_size for layer in group}) > 1:
        raise EditError("layers of different hidden sizes cannot share experts", where=group[0].name)
    cells = _cells(group, used)
    result = []
    for place, layer in enumerate(group):
        numbers = {member: number for number, member in enumerate(used[place])}
        mine = [cell for cell in cells if place in cell.users]
        old = layer.experts
        experts = ExpertsOp(
            old.x,
            layer.route.ids,
            layer.route.gates,
            [
                new_weight(layer, name, source, kind.static_shape, kind.dtype)
                for cell in mine
                for name, source, kind in zip(cell.names, cell.sources, cell.kinds, strict=True)
            ],
            regions=[copy_region(cell.region) for cell in mine],
            stored=tuple(stored[place]),
            classes=tuple(
                ExpertClass(tuple(numbers[member] for member in cell.members), len(cell.sources), cell.shared)
                for cell in mine
            ),
            protected=tuple(
                number for member, number in numbers.items() if member.expert in group[member.layer].protected
            ),
            location=old.location,
        )
        experts.insert_before(old)
        old.y.replace_all_uses_with(experts.y)
        result.append(replace(layer, experts=experts))
    for layer, new in zip(group, result, strict=True):
        erase_unused(layer.experts)
        settle_names(new.experts)
    return tuple(result)


@dataclass(frozen=True)
class _Cell:
    """Experts of one class of one layer that the same layers use: in the order of their stacks, which are `sources`."""

    members: tuple[BankExpert, ...]
    users: frozenset[int]
    region: Region
    shared: int
    names: tuple[str, ...]
    sources: tuple[Expression, ...]
    kinds: tuple[TensorType, ...]


def _cells(group: Sequence[MoeLayer], used: Sequence[Sequence[BankExpert]]) -> list[_Cell]:
    cells = []
    for home, layer in enumerate(group):
        for kind, stacks, region in layer.experts.class_operands():
            by_users: dict[frozenset[int], list[int]] = {}
            for row, expert in enumerate(kind.experts):
                users = frozenset(place for place, members in enumerate(used) if BankExpert(home, expert) in members)
                by_users.setdefault(users, []).append(row)
            for users, rows in by_users.items():
                if not users:
                    continue
                parts = [
                    _part(layer, stack, rows if position < kind.stacks else None)
                    for position, stack in enumerate(stacks)
                ]
                members = tuple(BankExpert(home, kind.experts[row]) for row in rows)
                names, sources, kinds = zip(*parts, strict=True) if parts else ((), (), ())
                cells.append(_Cell(members, users, region, kind.shared, names, sources, kinds))
    return cells


def _part(layer: MoeLayer, stack: Value, rows: Sequence[int] | None) -> tuple[str, Expression, TensorType]:
    """(name, source, type) of some rows of a stack, or of all of a shared operand."""
    weight = stack.defining_op
    if not isinstance(weight, WeightOp):
        raise EditError("a stack of expert weights is computed", where=layer.name)
    source, shape, dtype = parse_expression(weight.source), static_shape_of(stack), tensor_of(stack).dtype
    if rows is None:
        return weight.weight_name, source, tensor_of(stack)
    return weight.weight_name, rows_of(source, rows, shape[0]), TensorType((len(rows), *shape[1:]), dtype)


def growth_problem(layer: MoeLayer) -> str:
    """Why a router cannot get outputs that it never chooses, in words; empty where it can."""
    route, routing = layer.route, layer.route.routing
    if routing.select is not Select.TOPK:
        return f"its router selects by {routing.select.value}, not the best k"
    if routing.groups > 1:
        return "its router limits groups of experts"
    if routing.null_experts:
        return "its router has outputs without experts, which must be the last ones"
    if route.score_override is not None or route.forced_ids is not None:
        return "some of its choices are given"
    if route.logit_bias is not None and routing.bias_unit is not BiasUnit.ABS:
        return "its router adds a bias that depends on all logits"
    values = (route.logit_bias, route.mask, route.select_bias, route.per_expert_scale)
    if any(value is not None and tensor_of(value).rank != 1 for value in values):
        return "its router has a mask or a bias of its own for each token"
    return ""


def add_outputs(layer: MoeLayer, weights: WeightContext, targets: Sequence[int]) -> MoeLayer:
    """Router outputs for the stored experts `targets`, behind the others and masked: rows of zeros, never chosen.

    The layer computes what it did. Raises EditError where `growth_problem` says why, UsageError without a store.
    """
    problem = growth_problem(layer)
    if problem:
        raise EditError(f"router outputs cannot be added: {problem}", where=layer.name)
    count = len(targets)
    old = layer.route
    tensors: dict[str, Value | tuple[Value, ...]] = {"input": layer.router.tensor("input")}
    tensors["weight"] = _extended(layer, weights, layer.router.tensor("weight"), count, 0.0)
    for bias in layer.router.tensors("bias"):
        tensors["bias"] = _extended(layer, weights, bias, count, 0.0)
    kind = tensor_of(layer.router.result)
    router = aten.build(
        "linear.default",
        tensors,
        (TensorType((*kind.shape[:-1], layer.outputs + count), kind.dtype),),
        layer.router.location,
    )
    router.insert_before(layer.router)
    logits = logits_behind(layer, router.result, layer.outputs + count)
    values = {
        name: None if value is None else _extended(layer, weights, value, count, fill)
        for name, value, fill in (
            ("logit_bias", old.logit_bias, 0.0),
            ("select_bias", old.select_bias, 0.0),
            ("per_expert_scale", old.per_expert_scale, 1.0),
        )
    }
    route = RouteOp(
        logits,
        values["logit_bias"],
        _mask(layer, count),
        None,
        None,
        values["select_bias"],
        None,
        values["per_expert_scale"],
        routing=old.routing,
        location=old.location,
    )
    route.insert_before(old)
    experts = layer.experts
    experts.set_operand(1, route.ids)
    experts.set_operand(2, route.gates)
    experts.stored = (*layer.stored, *targets)
    old.count.replace_all_uses_with(route.count)
    erase_unused(old)
    settle_names(experts)
    return replace(layer, route=route, router=router)


def _extended(layer: MoeLayer, weights: WeightContext, value: Value, count: int, fill: float) -> Value:
    """A weight or a constant with one entry per output, and `count` more that are `fill`."""
    op, kind = value.defining_op, tensor_of(value)
    shape = (count, *static_shape_of(value)[1:])
    if isinstance(op, WeightOp):
        more = store_tensor(weights, torch.full(shape, fill))
        source = Concat(0, (parse_expression(op.source), more))
        return new_weight(layer, op.weight_name, source, (layer.outputs + count, *shape[1:]))
    if isinstance(op, ConstantOp) and kind.dtype is DType.F32:
        data = op.data.data + torch.full(shape, fill).numpy().tobytes()
        return _constant(layer, data, TensorType((layer.outputs + count, *shape[1:]), DType.F32))
    raise EditError("a value per expert of its router is computed", where=layer.name)


def _mask(layer: MoeLayer, count: int) -> Value:
    """i1 [outputs + count]: the old mask, or true, and false."""
    old = layer.route.mask
    data = b"\x01" * layer.outputs
    if old is not None:
        op = old.defining_op
        if not isinstance(op, ConstantOp):
            raise EditError("the mask of its router is computed", where=layer.name)
        data = op.data.data
    return _constant(layer, data + b"\x00" * count, TensorType((layer.outputs + count,), DType.I1))


def _constant(layer: MoeLayer, data: bytes, kind: TensorType) -> Value:
    constant = ConstantOp(data=DenseConstant(data), result_types=[kind], location=layer.route.location)
    constant.insert_before(layer.router)
    return constant.value
