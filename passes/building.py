"""Small aten operations that patterns insert, with their result types worked out. Identities insert nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.dialects import aten
from moec.ir import DimExpr, Operation, TensorType, Value
from moec.passes.matching import made_by, shape, tensor


class Builder:
    """Inserts operations where `insert` puts them, such as before the root of a match: `Builder(rewriter.insert)`."""

    def __init__(self, insert: Callable[[Operation], object]) -> None:
        self._insert = insert

    def insert(self, op: Operation) -> Value:
        """Inserts any operation; gives its first result."""
        self._insert(op)
        return op.results[0]

    def aten(
        self, name: str, tensors: dict[str, Value | tuple[Value, ...]], kind: TensorType, **arguments: Any
    ) -> Value:
        """`aten.<name>` with one result of type `kind`."""
        return self.insert(aten.build(name, tensors, (kind,), **arguments))

    def permute(self, value: Value, dims: Sequence[int]) -> Value:
        """The axes in another order; a permutation of a permutation is one."""
        inner = made_by(value, "permute.default", "transpose.int")
        if inner is not None:
            order = permutation(inner)
            value, dims = inner.tensor("self"), [order[dim] for dim in dims]
        if list(dims) == list(range(len(dims))):
            return value
        kind = TensorType(tuple(shape(value)[dim] for dim in dims), tensor(value).dtype)
        return self.aten("permute.default", {"self": value}, kind, dims=tuple(dims))

    def unsqueeze(self, value: Value, dim: int) -> Value:
        """A new axis of size 1 before axis `dim` (non-negative)."""
        sizes = shape(value)
        kind = TensorType((*sizes[:dim], 1, *sizes[dim:]), tensor(value).dtype)
        return self.aten("unsqueeze.default", {"self": value}, kind, dim=dim)

    def squeeze(self, value: Value, dim: int) -> Value:
        """Without axis `dim`, which has size 1; undoes an unsqueeze."""
        inner = made_by(value, "unsqueeze.default")
        if inner is not None and inner.argument("dim") % len(shape(value)) == dim:
            return inner.tensor("self")
        sizes = shape(value)
        kind = TensorType((*sizes[:dim], *sizes[dim + 1 :]), tensor(value).dtype)
        return self.aten("squeeze.dim", {"self": value}, kind, dim=dim)

    def view(self, value: Value, sizes: Sequence[int | DimExpr]) -> Value:
        """The same elements in another shape."""
        if shape(value) == tuple(sizes):
            return value
        kind = TensorType(tuple(sizes), tensor(value).dtype)
        return self.aten("view.default", {"self": value}, kind, size=tuple(sizes))

    def expand(self, value: Value, sizes: Sequence[int | DimExpr]) -> Value:
        """Axes of size 1 repeated."""
        if shape(value) == tuple(sizes):
            return value
        kind = TensorType(tuple(sizes), tensor(value).dtype)
        return self.aten("expand.default", {"self": value}, kind, size=tuple(sizes))

    def concat(self, values: Sequence[Value], dim: int) -> Value:
        """Along the axis `dim` (non-negative)."""
        sizes = list(shape(values[0]))
        for value in values[1:]:
            sizes[dim] = sizes[dim] + shape(value)[dim]
        kind = TensorType(tuple(sizes), tensor(values[0]).dtype)
        return self.aten("cat.default", {"tensors": tuple(values)}, kind, dim=dim)

    def channels(self, value: Value, start: int, count: int, step: int = 1) -> Value:
        """`count` channels of the last axis."""
        size = shape(value)[-1]
        if (start, count, step) == (0, size, 1):
            return value
        last = len(shape(value)) - 1
        kind = TensorType((*shape(value)[:-1], count), tensor(value).dtype)
        end = start + (count - 1) * step + 1
        return self.aten("slice.Tensor", {"self": value}, kind, dim=last, start=start, end=end, step=step)

    def widen_channels(self, value: Value, width: int) -> Value:
        """Zeros behind the channels of the last axis, up to `width`."""
        count = shape(value)[-1]
        if count == width:
            return value
        assert isinstance(count, int)
        kind = TensorType((*shape(value)[:-1], width), tensor(value).dtype)
        return self.aten("constant_pad_nd.default", {"self": value}, kind, pad=(0, width - count), value=0.0)

    def repeat_channels(self, value: Value) -> Value:
        """Each channel twice in a row: [..., r] to [..., 2 r]."""
        sizes = shape(value)
        pairs = self.expand(self.unsqueeze(value, len(sizes)), (*sizes, 2))
        return self.view(pairs, (*sizes[:-1], sizes[-1] * 2))


def permutation(op: aten.AtenOp) -> list[int]:
    """The axes of a `permute.default` or `transpose.int`, non-negative."""
    rank = len(shape(op.operands[0]))
    if op.name == "aten.permute.default":
        return [dim % rank for dim in op.argument("dims")]
    order = list(range(rank))
    first, second = op.argument("dim0") % rank, op.argument("dim1") % rank
    order[first], order[second] = order[second], order[first]
    return order
