"""What a tensor is before its numbers are read: shape and element type, and the names of element types."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch

TEXT_TO_DTYPE: dict[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "ui64": torch.uint64,
    "ui32": torch.uint32,
    "ui16": torch.uint16,
    "ui8": torch.uint8,
    "i1": torch.bool,
    "f8E4M3FN": torch.float8_e4m3fn,
    "f8E5M2": torch.float8_e5m2,
    "f8E8M0FNU": torch.float8_e8m0fnu,
    "complex<f32>": torch.complex64,
}
"""Element types by the name they have in the IR and in the text of weight expressions."""

DTYPE_TO_TEXT: dict[torch.dtype, str] = {dtype: text for text, dtype in TEXT_TO_DTYPE.items()}

SAFETENSORS_TO_DTYPE: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}
"""Element types by the name they have in the header of a safetensors file."""

DTYPE_TO_SAFETENSORS: dict[torch.dtype, str] = {dtype: text for text, dtype in SAFETENSORS_TO_DTYPE.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and element type of a tensor whose numbers need not be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes when stored densely."""
        return self.elements * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{DTYPE_TO_TEXT[self.dtype]}{list(self.shape)}"


def begin_content_digest(spec: TensorSpec) -> hashlib._Hash:
    """A SHA-256 that has taken in shape and element type; the tensor's bytes (dense, little endian) come next."""
    return hashlib.sha256(f"moec tensor 1 {spec}\n".encode())


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a dense copy of `tensor` (any shape, any element type), without a copy where it is dense already."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def content_digest(tensor: torch.Tensor) -> str:
    """Hexadecimal SHA-256 of shape, element type and bytes of `tensor`."""
    digest = begin_content_digest(TensorSpec(tuple(tensor.shape), tensor.dtype))
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
