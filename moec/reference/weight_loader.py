"""Loads weights at their use, for one executor."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from moec.dialects.builtin import WeightOp
from moec.errors import UsageError
from moec.ir import TensorType
from moec.reference.element_types import ElementTypes
from moec.weights.context import WeightContext
from moec.weights.expression import Expression


class WeightLoader:
    """Gives the tensors of `moec.weight` operations in the types of a run.

    `overrides` replace weights by name, as they are: with `requires_grad` set, gradients reach them. Nothing is kept
    between two calls unless `keep` is set.
    """

    def __init__(self, context: WeightContext, types: ElementTypes, keep: bool = False) -> None:
        self._context = context
        self._types = types
        self.keep = keep
        self.overrides: Mapping[str, torch.Tensor] = {}
        self._kept: dict[tuple[WeightOp, int | None], torch.Tensor] = {}

    def nbytes(self, op: WeightOp) -> int:
        """Bytes of the tensor in the type of the run."""
        kind = op.value.type
        assert isinstance(kind, TensorType)
        return math.prod(kind.static_shape) * self._types[kind.dtype].itemsize

    def load_rows(self, op: WeightOp, start: int, stop: int) -> torch.Tensor:
        """A part of the first dimension, which is never kept."""
        kind = op.value.type
        assert isinstance(kind, TensorType)
        override = self.overrides.get(op.weight_name)
        found = self._context.load(self._source(op), slice(start, stop)) if override is None else override[start:stop]
        return found.to(self._types[kind.dtype])

    def load(self, op: WeightOp, index: int | None = None) -> torch.Tensor:
        """The tensor, or one row of its first dimension; raises UsageError where its shape is not the declared one."""
        kind = op.value.type
        assert isinstance(kind, TensorType)
        shape = kind.static_shape if index is None else kind.static_shape[1:]
        override = self.overrides.get(op.weight_name)
        if override is not None:
            found = override if index is None else override[index]
        else:
            kept = self._kept.get((op, index))
            if kept is not None:
                return kept
            found = self._context.load(self._source(op), index)
        if tuple(found.shape) != shape:
            raise UsageError(
                f"the weight {op.weight_name} has shape {list(found.shape)}, the module declares {list(shape)}",
                where=op.source[:300],
            )
        tensor = found.to(self._types[kind.dtype])
        if self.keep and override is None:
            self._kept[op, index] = tensor
        return tensor

    def _source(self, op: WeightOp) -> Expression | str:
        return self._context.unrounded(op.source) if self._types.dtype is torch.float64 else op.source

    def forget(self) -> None:
        """Frees everything that was kept."""
        self._kept.clear()
