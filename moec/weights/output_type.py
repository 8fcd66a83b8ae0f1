"""The element type that an artifact stores matrices in."""

from __future__ import annotations

from enum import Enum


class OutputDType(Enum):
    """The element type of the weights and of the arithmetic in the artifact."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"  # of kernels only: ONNX artifacts have float32 or float16

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return 4 if self is OutputDType.FLOAT32 else 2
