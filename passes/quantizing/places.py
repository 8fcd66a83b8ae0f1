"""Matrices outside of experts that `quantize` can pack: each read by linear maps or as a table of embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from moec.dialects.aten import AtenOp
from moec.dialects.builtin import FuncOp, WeightOp
from moec.dialects.moe import RouteOp
from moec.dialects.quant import DequantOp
from moec.experts.layer import router_of
from moec.experts.parts import erase_unused, new_weight, static_shape_of, store_tensor
from moec.ir import Operation, Value
from moec.quantization.packed import OPERANDS, Packed
from moec.reference.element_types import ir_type
from moec.reference.layers import layer_of
from moec.weights.context import WeightContext

_FEW_OUTPUTS = 8


class What(Enum):
    """Weights by their use.

    EXPERTS: routed ones. DENSE: feed-forward blocks without a router, shared experts among them. ATTENTION: the other
    linear maps of the layers, unless they have fewer than 8 outputs. EMBEDDING: tables of embeddings and linear maps
    outside of the layers, such as the head. ROUTER: the linear maps that choose experts. ALL: everything but routers.
    """

    EXPERTS = "experts"
    DENSE = "dense"
    ATTENTION = "attention"
    EMBEDDING = "embedding"
    ROUTER = "router"
    ALL = "all"


@dataclass(frozen=True)
class Place:
    """A weight [N, K] and the operations that read it as a matrix with K inputs, or as N rows of a table."""

    what: What
    weight: WeightOp
    readers: tuple[AtenOp, ...]


def find_places(root: Operation) -> Iterator[Place]:
    """The weights of linear maps and embeddings, in order. What something else reads too is left out."""
    routers = _routers(root)
    for op in list(root.walk()):
        if isinstance(op, WeightOp) and (what := _use_of(op.value, routers)) is not None:
            yield Place(what, op, tuple(user for user in dict.fromkeys(op.value.users) if isinstance(user, AtenOp)))


def find_packed(root: Operation) -> Iterator[tuple[What, DequantOp]]:
    """What `find_places` would find if it were not packed already; experts and other blocks apart."""
    routers = _routers(root)
    for op in root.walk():
        if isinstance(op, DequantOp) and isinstance(op.parent_op, FuncOp):
            what = _use_of(op.weight, routers)
            if what is not None:
                yield what, op


def _routers(root: Operation) -> set[Value]:
    """The logits of all routers."""
    return {router.result for op in root.walk() if isinstance(op, RouteOp) and (router := router_of(op)) is not None}


def _use_of(value: Value, routers: set[Value]) -> What | None:
    """What reads a matrix, None where that is no linear map or embedding, or something else too."""
    users = list(dict.fromkeys(value.users))
    if not users or len(static_shape_of(value)) != 2:
        return None
    readers = [user for user in users if isinstance(user, AtenOp) and _reads(user, value)]
    if len(readers) < len(users):
        return None
    if any(user.result in routers for user in readers):
        return What.ROUTER
    if any(user.name == _EMBEDDING or layer_of(user) is None for user in readers):
        return What.EMBEDDING
    return What.ATTENTION if static_shape_of(value)[0] >= _FEW_OUTPUTS else None


def pack_place(place: Place, weights: WeightContext, packed: Packed) -> None:
    """Puts a packed matrix in the place of a weight; each reader unpacks it for itself, where it stands."""
    sources = {
        name: (store_tensor(weights, tensor, ir_type(tensor.dtype)), tensor)
        for name, tensor in packed.tensors().items()
    }
    for reader in place.readers:
        values: dict[str, Value] = {
            name: new_weight(
                reader, f"{place.weight.weight_name}.{name}", source, tuple(tensor.shape), ir_type(tensor.dtype)
            )
            for name, (source, tensor) in sources.items()
        }
        op = DequantOp(
            *[values.get(name) for name in OPERANDS],
            format=packed.format,
            columns=packed.columns,
            location=reader.location,
        )
        op.insert_before(reader)
        for position, value in enumerate(reader.operands):
            if value is place.weight.value:
                reader.set_operand(position, op.weight)
    erase_unused(place.weight)


_EMBEDDING = "aten.embedding.default"


def _reads(user: AtenOp, value: Value) -> bool:
    """Whether an operation reads a value as the matrix of a linear map or a table, and as nothing else."""
    if user.name not in (_EMBEDDING, "aten.linear.default"):
        return False
    return user.tensor("weight") is value and sum(operand is value for operand in user.operands) == 1
