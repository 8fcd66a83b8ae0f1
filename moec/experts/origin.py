"""Which part of which stored tensor a tensor of a loaded expert is: what passes left alone stays a reference to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moec.dialects.builtin import WeightOp
from moec.experts.expert import Loaded, View
from moec.weights.expression_parser import parse_expression


@dataclass(frozen=True)
class Given:
    """A weight as it was loaded: whole, or one `row` of a stack."""

    tensor: torch.Tensor
    op: WeightOp
    row: int | None


def loaded_from(tensors: Sequence[torch.Tensor], given: Sequence[Given]) -> tuple[Loaded, ...]:
    """Of each of `tensors` that shares memory with a given weight, the part of the weight that it is."""
    found = []
    for tensor in tensors:
        for item in given:
            if tensor.untyped_storage().data_ptr() == item.tensor.untyped_storage().data_ptr():
                view = _view_of(tensor, item.tensor)
                if view is not None:
                    stack = parse_expression(item.op.source)
                    found.append(Loaded(tensor, tensor._version, stack, item.row, view))
    return tuple(found)


def _view_of(tensor: torch.Tensor, base: torch.Tensor) -> View | None:
    """`tensor` as a part of the contiguous `base`; None where it is none that a view can say."""
    if tensor.dim() != base.dim() or not 1 <= base.dim() <= 2 or not base.is_contiguous() or not tensor.numel():
        return None
    offset = int(tensor.storage_offset() - base.storage_offset())
    candidates = [False] if base.dim() == 1 else [False, True]
    for transposed in candidates:
        part = tensor.T if transposed else tensor
        strides = base.stride()
        starts, stops, steps, rest = [], [], [], offset
        for size, own, stride in zip(part.shape, part.stride(), strides, strict=True):
            start, rest = divmod(rest, int(stride))
            step = max(int(own) // int(stride), 1)
            starts.append(start)
            stops.append(start + (size - 1) * step + 1)
            steps.append(step)
        view = View(tuple(starts), tuple(stops), tuple(steps), transposed)
        seen = base[tuple(slice(*cut) for cut in zip(starts, stops, steps, strict=True))]
        seen = seen.T if transposed else seen
        if seen.shape == tensor.shape and seen.stride() == tensor.stride() and seen.data_ptr() == tensor.data_ptr():
            return view
    return None
