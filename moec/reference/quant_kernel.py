"""`quant.dequant` on torch: the semantics of packed weights."""

from __future__ import annotations

import torch

from moec.dialects.quant import DequantOp
from moec.ir import DType
from moec.quantization.packed import OPERANDS, Packed
from moec.reference.frame import Frame
from moec.reference.kernels import Kernel, prepares


@prepares(DequantOp)
def prepare_dequant(op: DequantOp) -> Kernel:
    """Raises VerificationError where the stored numbers do not obey their format."""
    operands = {name: value for name in OPERANDS if (value := getattr(op, name)) is not None}
    kind, columns, where = op.format, op.columns, f"{op!r} at {op.location}"

    def compute(frame: Frame) -> tuple[torch.Tensor]:
        packed = Packed(kind, columns, **{name: frame.tensor(value) for name, value in operands.items()})
        packed.require(where)
        return (packed.dense(frame.settings.types[DType.F32]),)

    return compute
