"""Small parts of edits: weights under free names, copies of bodies, what nobody reads any more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from moec.dialects.builtin import WeightOp
from moec.dialects.moe import RouteOp, Routing
from moec.errors import UsageError
from moec.experts.layer import MoeLayer
from moec.ir import Block, DType, Operation, Region, TensorType, Value
from moec.reference.element_types import stored_type
from moec.weights.context import WeightContext
from moec.weights.expression import Cast, Expression
from moec.weights.tensor_spec import TensorSpec


def new_weight(
    reader: MoeLayer | Operation, name: str, source: Expression, shape: Sequence[int], dtype: DType = DType.F32
) -> Value:
    """A weight before an operation, or before the router of a layer; the one that is there already where one of the
    same source is."""
    anchor: Operation
    if isinstance(reader, MoeLayer):
        anchor = reader.router if reader.router.parent is not None else reader.experts
        location = reader.experts.location
    else:
        anchor, location = reader, reader.location
    text, kind = str(source), TensorType(tuple(shape), dtype)
    taken = {}
    for op in _weights_around(anchor):
        taken[op.weight_name] = op
        if op.source == text and op.value.type == kind and _comes_before(op, anchor):
            return op.value
    unique, number = name, 1
    while unique in taken:
        number += 1
        unique = f"{name}#{number}"
    weight = WeightOp(result_types=[kind], weight_name=unique, source=text, location=location)
    weight.insert_before(anchor)
    return weight.value


def settle_names(anchor: Operation) -> None:
    """Drops the numbers from names of weights that have become free."""
    weights = list(_weights_around(anchor))
    taken = {op.weight_name for op in weights}
    for op in weights:
        plain = op.weight_name.partition("#")[0]
        if plain not in taken:
            taken.remove(op.weight_name)
            taken.add(plain)
            op.weight_name = plain


def _weights_around(anchor: Operation) -> Iterator[WeightOp]:
    assert anchor.parent is not None
    return (op for op in anchor.parent if isinstance(op, WeightOp))


def _comes_before(op: Operation, anchor: Operation) -> bool:
    following = op.next
    while following is not None:
        if following is anchor:
            return True
        following = following.next
    return False


def store_tensor(weights: WeightContext, tensor: torch.Tensor, dtype: DType = DType.F32) -> Expression:
    """The expression of a computed tensor, stored in `dtype`; raises UsageError where there is no store."""
    if weights.store is None:
        raise UsageError(
            "this pass computes weights, but there is no store for them", hint="give the folder of a store"
        )
    return weights.store.put(tensor.detach().to(stored_type(dtype)).contiguous())


def store_unrounded(
    weights: WeightContext, spec: TensorSpec, parts: Iterable[torch.Tensor], dtype: DType
) -> Expression:
    """The expression of a tensor of the module's type `dtype` whose float64 numbers come in parts along dimension 0.

    Float64 runs read them as they are (`WeightContext.unrounded`). Raises UsageError where there is no store.
    """
    if weights.store is None:
        raise UsageError(
            "this pass computes weights, but there is no store for them", hint="give the folder of a store"
        )
    stored = weights.store.put_parts(spec, parts)
    return stored if dtype is DType.F64 else Cast(stored, stored_type(dtype))


def copy_region(region: Region) -> Region:
    """The body of a class once more."""
    block = Block([argument.type for argument in region.block.arguments])
    mapping: dict[Value, Value] = dict(zip(region.block.arguments, block.arguments, strict=True))
    for op in region.block:
        block.append(op.clone(mapping))
    return Region(block)


def tensor_of(value: Value) -> TensorType:
    """The type of a tensor."""
    assert isinstance(value.type, TensorType)
    return value.type


def static_shape_of(value: Value) -> tuple[int, ...]:
    """The sizes of a tensor that are all known."""
    return tensor_of(value).static_shape


def f32(shape: Sequence[int]) -> TensorType:
    """The type of a float32 tensor."""
    return TensorType(tuple(shape), DType.F32)


def logits_behind(layer: MoeLayer, logits: Value, outputs: int) -> Value:
    """What lies between the router and the route, for other logits."""
    chain: list[Operation] = []
    op = layer.route.logits.defining_op
    while op is not None and op is not layer.router:
        chain.append(op)
        op = op.operands[0].defining_op
    for op in reversed(chain):
        copy = op.clone({op.operands[0]: logits})
        kind = tensor_of(op.results[0])
        kind = TensorType((*kind.shape[:-1], outputs), kind.dtype)
        copy.results[0].type = kind
        if "size" in copy.attributes:
            copy.attributes["size"] = kind.shape
        copy.insert_before(layer.route)
        logits = copy.results[0]
    return logits


def route_with(old: RouteOp, routing: Routing) -> RouteOp:
    """A detached route of the same operands with other stages."""
    return RouteOp(
        old.logits,
        old.logit_bias,
        old.mask,
        old.score_override,
        old.override_on,
        old.select_bias,
        old.forced_ids,
        old.per_expert_scale,
        routing=routing,
        location=old.location,
    )


def erase_unused(op: Operation) -> None:
    """Erases an operation that nobody reads, and what only led to it."""
    frontier = [op]
    while frontier:
        op = frontier.pop()
        if op.has_uses or op.parent is None:
            continue
        makers = [value.defining_op for value in op.operands]
        op.erase()
        frontier += [maker for maker in makers if maker is not None and maker.pure]
