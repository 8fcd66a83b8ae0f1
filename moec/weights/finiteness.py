"""Weights that hold NaN or infinities, by name."""

from __future__ import annotations

from collections.abc import Iterable

from moec.dialects.builtin import WeightOp
from moec.errors import UnsafeInputError
from moec.ir import Operation, TensorType
from moec.weights.context import WeightContext


def require_finite(weights: WeightContext, ops: Iterable[Operation | None], *, where: str) -> None:
    """Reads the weights of floating point among `ops`.

    Raises UnsafeInputError that names the first one with a value that is no finite number; `where` reads it.
    """
    for op in ops:
        if isinstance(op, WeightOp) and isinstance(op.value.type, TensorType) and op.value.type.dtype.is_float:
            for chunk in weights.chunks(op.source):
                if not bool(chunk.float().isfinite().all()):
                    raise UnsafeInputError(
                        f"the weight {op.weight_name} holds values that are no finite numbers",
                        where=where,
                        hint="the checkpoint is broken; download or save it again",
                    )
