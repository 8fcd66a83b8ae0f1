"""A tensor that has no numbers: what is done to it is recorded as a weight expression.

The conversion operations of transformers are Python functions on tensors. Run on these tensors, they yield the
expressions that compute the same on the real ones, whatever the operations are called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from moec.errors import UnsupportedModelError
from moec.weights.expression import Cast, Concat, Expression, Permute, Reshape, Slice, Stack, Transpose

_aten = torch.ops.aten


class SymbolicTensor(torch.Tensor):
    """A tensor of known shape and element type whose value is `expression`.

    It always claims to be dense in row-major order, so that `contiguous` is nothing and `reshape` is a view.
    Operations that move elements are recorded; every other one raises UnsupportedModelError and names itself.
    """

    expression: Expression

    @staticmethod
    def __new__(cls, expression: Expression, shape: Sequence[int], dtype: torch.dtype) -> SymbolicTensor:
        result: SymbolicTensor = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=torch.device("cpu")
        )
        result.expression = expression
        return result

    def __init__(self, expression: Expression, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch leaves it untyped
        return f"SymbolicTensor({self.expression}, shape={list(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types this class method as an instance method
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        record = _RECORDERS.get(func)
        if record is None:
            raise UnsupportedModelError(
                f"the weights are converted with {func}, which computes and does not only move elements",
                hint="save the model with a newer transformers, so that its weights need no conversion",
            )
        result = record(*args, **(kwargs or {}))
        # torch refuses a view that is the very tensor it was taken from
        return [_alias(part) for part in result] if isinstance(result, list) else _alias(result)


def _alias(tensor: SymbolicTensor) -> SymbolicTensor:
    return SymbolicTensor(tensor.expression, tensor.shape, tensor.dtype)


def _cat(tensors: list[SymbolicTensor], dim: int = 0) -> SymbolicTensor:
    if len(tensors) == 1:
        return tensors[0]
    first = tensors[0]
    dim %= first.ndim
    for other in tensors[1:]:
        same = other.ndim == first.ndim and all(a == b or k == dim for k, (a, b) in _sizes(first, other))
        if not same or other.dtype != first.dtype:
            raise _unequal("concatenated", first, other)
    shape = [*first.shape]
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return SymbolicTensor(Concat(dim, tuple(tensor.expression for tensor in tensors)), shape, first.dtype)


def _stack(tensors: list[SymbolicTensor], dim: int = 0) -> SymbolicTensor:
    first = tensors[0]
    for other in tensors[1:]:
        if other.shape != first.shape or other.dtype != first.dtype:
            raise _unequal("stacked", first, other)
    dim %= first.ndim + 1
    shape = [*first.shape[:dim], len(tensors), *first.shape[dim:]]
    return SymbolicTensor(Stack(dim, tuple(tensor.expression for tensor in tensors)), shape, first.dtype)


def _sizes(first: torch.Tensor, other: torch.Tensor) -> list[tuple[int, tuple[int, int]]]:
    return list(enumerate(zip(first.shape, other.shape, strict=True)))


def _unequal(what: str, first: SymbolicTensor, other: SymbolicTensor) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"tensors that must be {what} do not fit together: {first.expression} is {first.dtype} {list(first.shape)}, "
        f"{other.expression} is {other.dtype} {list(other.shape)}",
        hint="the checkpoint is inconsistent; download it again",
    )


def _view(tensor: SymbolicTensor, shape: Sequence[int]) -> SymbolicTensor:
    sizes = list(shape)
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = tensor.numel() // known if known else 0
    if sizes == [*tensor.shape]:
        return tensor
    operand = tensor.expression
    # a view of a view reads the same elements in the same order
    while isinstance(operand, Reshape):
        operand = operand.operand
    return SymbolicTensor(Reshape(operand, tuple(sizes)), sizes, tensor.dtype)


def _transpose(tensor: SymbolicTensor, first: int, second: int) -> SymbolicTensor:
    one, other = sorted((first % tensor.ndim, second % tensor.ndim))
    if one == other:
        return tensor
    shape = [*tensor.shape]
    shape[one], shape[other] = shape[other], shape[one]
    operand = tensor.expression
    if isinstance(operand, Transpose) and (operand.first, operand.second) == (one, other):
        return SymbolicTensor(operand.operand, shape, tensor.dtype)
    return SymbolicTensor(Transpose(operand, one, other), shape, tensor.dtype)


def _t(tensor: SymbolicTensor) -> SymbolicTensor:
    return _transpose(tensor, 0, 1) if tensor.ndim == 2 else tensor


def _permute(tensor: SymbolicTensor, dims: Sequence[int]) -> SymbolicTensor:
    order = tuple(dim % tensor.ndim for dim in dims)
    if order == tuple(range(tensor.ndim)):
        return tensor
    return SymbolicTensor(Permute(tensor.expression, order), [tensor.shape[dim] for dim in order], tensor.dtype)


def _slice(
    tensor: SymbolicTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> SymbolicTensor:
    dim %= tensor.ndim
    size = tensor.shape[dim]
    first, last, step = slice(start, end, step).indices(size)
    last = max(first, last)
    if (first, last, step) == (0, size, 1):
        return tensor
    shape = [*tensor.shape]
    shape[dim] = len(range(first, last, step))
    return SymbolicTensor(Slice(tensor.expression, dim, first, last, step), shape, tensor.dtype)


def _split(tensor: SymbolicTensor, size: int, dim: int = 0) -> list[SymbolicTensor]:
    total = tensor.shape[dim]
    return [_slice(tensor, dim, start, start + size) for start in range(0, total, max(size, 1))]


def _split_with_sizes(tensor: SymbolicTensor, sizes: Sequence[int], dim: int = 0) -> list[SymbolicTensor]:
    if sum(sizes) != tensor.shape[dim]:
        raise UnsupportedModelError(
            f"{tensor.expression} of shape {list(tensor.shape)} must be split into parts of {list(sizes)} "
            f"along dimension {dim}, which do not cover it",
            hint="the sizes in config.json contradict the checkpoint",
        )
    starts = [sum(sizes[:position]) for position in range(len(sizes))]
    return [_slice(tensor, dim, start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _select(tensor: SymbolicTensor, dim: int, index: int) -> SymbolicTensor:
    dim %= tensor.ndim
    index %= tensor.shape[dim]
    return _view(_slice(tensor, dim, index, index + 1), [*tensor.shape[:dim], *tensor.shape[dim + 1 :]])


def _unbind(tensor: SymbolicTensor, dim: int = 0) -> list[SymbolicTensor]:
    return [_select(tensor, dim, index) for index in range(tensor.shape[dim])]


def _unsqueeze(tensor: SymbolicTensor, dim: int) -> SymbolicTensor:
    dim %= tensor.ndim + 1
    return _view(tensor, [*tensor.shape[:dim], 1, *tensor.shape[dim:]])


def _squeeze(tensor: SymbolicTensor, dim: int | Sequence[int] | None = None) -> SymbolicTensor:
    dims = range(tensor.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {one % tensor.ndim for one in dims if tensor.shape[one] == 1}
    return _view(tensor, [size for position, size in enumerate(tensor.shape) if position not in gone])


def _same(tensor: SymbolicTensor, **_: object) -> SymbolicTensor:
    return tensor


def _to_copy(tensor: SymbolicTensor, dtype: torch.dtype | None = None, **_: object) -> SymbolicTensor:
    if dtype is None or dtype == tensor.dtype:
        return tensor
    return SymbolicTensor(Cast(tensor.expression, dtype), tensor.shape, dtype)


_RECORDERS: dict[Any, Callable[..., SymbolicTensor | list[SymbolicTensor]]] = {
    _aten.cat.default: _cat,
    _aten.stack.default: _stack,
    _aten.view.default: _view,
    _aten._unsafe_view.default: _view,
    _aten.transpose.int: _transpose,
    _aten.t.default: _t,
    _aten.permute.default: _permute,
    _aten.slice.Tensor: _slice,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split_with_sizes,
    _aten.select.int: _select,
    _aten.unbind.int: _unbind,
    _aten.unsqueeze.default: _unsqueeze,
    _aten.squeeze.default: _squeeze,
    _aten.squeeze.dim: _squeeze,
    _aten.squeeze.dims: _squeeze,
    _aten.clone.default: _same,
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten._to_copy.default: _to_copy,
}
