"""Element types of the IR as torch types, for a run in float32 or in float64."""

from __future__ import annotations

import torch

from moec.errors import UsageError
from moec.ir import DType

_TORCH_TYPES = {
    DType.F64: torch.float64,
    DType.F32: torch.float32,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.F8E4M3FN: torch.float8_e4m3fn,
    DType.F8E5M2: torch.float8_e5m2,
    DType.C64: torch.complex64,
    DType.I64: torch.int64,
    DType.I32: torch.int32,
    DType.I16: torch.int16,
    DType.I8: torch.int8,
    DType.U8: torch.uint8,
    DType.I1: torch.bool,
}


def stored_type(dtype: DType) -> torch.dtype:
    """The torch type that holds exactly the elements of `dtype`."""
    return _TORCH_TYPES[dtype]


def ir_type(dtype: torch.dtype) -> DType:
    """The element type of the IR whose elements torch holds in `dtype`."""
    return _FROM_TORCH[dtype]


_FROM_TORCH = {torch_type: dtype for dtype, torch_type in _TORCH_TYPES.items()}


class ElementTypes:
    """Which torch type a run uses for each element type: in a float64 run, every f32 is float64, casts included."""

    def __init__(self, dtype: torch.dtype) -> None:
        """`dtype`: torch.float32 or torch.float64; raises UsageError for others."""
        if dtype not in (torch.float32, torch.float64):
            raise UsageError(f"the reference executor runs in float32 or float64, not in {dtype}")
        self.dtype = dtype
        self._types = dict(_TORCH_TYPES)
        if dtype is torch.float64:
            self._types[DType.F32] = torch.float64
            self._types[DType.C64] = torch.complex128

    def __getitem__(self, dtype: DType) -> torch.dtype:
        return self._types[dtype]
