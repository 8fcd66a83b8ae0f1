"""Vocabulary-sized weights: embeddings read the rows that they need, projections run piece by piece."""

from __future__ import annotations

import torch

from moec.dialects.aten import AtenOp
from moec.dialects.builtin import WeightOp
from moec.ir import TensorType, Value
from moec.reference.aten_kernel import prepare_aten
from moec.reference.frame import Frame
from moec.reference.kernels import Kernel, prepares

LARGE_BYTES = 128 << 20
"""Weights above this size, in the type of the run, are not loaded as a whole."""


@prepares("aten.embedding.default")
def prepare_embedding(op: AtenOp) -> Kernel:
    """Rows of a large table are loaded one by one where few of them are needed."""
    whole = prepare_aten(op)
    table, indices = op.tensor("weight"), op.tensor("indices")

    def compute(frame: Frame) -> tuple[torch.Tensor]:
        weight = _large_weight(table, frame)
        if weight is not None:
            needed, places = torch.unique(frame.tensor(indices), return_inverse=True)
            if 0 < len(needed) <= _row_count(weight) // 8:
                rows = torch.stack([frame.settings.weights.load(weight, index) for index in needed.tolist()])
                return (rows[places],)
        (result,) = whole(frame)
        return (result,)

    return compute


@prepares("aten.linear.default")
def prepare_linear(op: AtenOp) -> Kernel:
    """The outputs of a large projection are computed in pieces, each from its rows of the weight."""
    whole = prepare_aten(op)
    source, matrix = op.tensor("input"), op.tensor("weight")
    biases = op.tensors("bias")

    def compute(frame: Frame) -> tuple[torch.Tensor]:
        weight = _large_weight(matrix, frame)
        if weight is None:
            (result,) = whole(frame)
            return (result,)
        loader = frame.settings.weights
        x = frame.tensor(source)
        bias = frame.tensor(biases[0]) if biases else None
        count = _row_count(weight)
        step = max(1, count * LARGE_BYTES // loader.nbytes(weight))
        pieces = []
        for start in range(0, count, step):
            stop = min(start + step, count)
            part = None if bias is None else bias[start:stop]
            pieces.append(torch.nn.functional.linear(x, loader.load_rows(weight, start, stop), part))
        return (torch.cat(pieces, dim=-1),)

    return compute


def _row_count(op: WeightOp) -> int:
    kind = op.value.type
    assert isinstance(kind, TensorType)
    return kind.static_shape[0]


def _large_weight(value: Value, frame: Frame) -> WeightOp | None:
    """The weight that a value is, if it is too large to be loaded and not meant to be kept."""
    op = value.defining_op
    loader = frame.settings.weights
    if not isinstance(op, WeightOp) or value in frame.values or loader.keep:
        return None
    return op if loader.nbytes(op) > LARGE_BYTES else None
