"""Makes Triton's interpreter right for bfloat16 and for casts to 8-bit floats.

The interpreter keeps such numbers as their bits in unsigned integers. As of 3.9 it multiplies and adds these bits as if
they were numbers, cuts instead of rounding, and loses carries of casts to 8-bit floats (seen with 3.7.1 and 3.9.0;
triton-lang/triton #11584 says that bfloat16 is not supported there). The repair computes in float32 and rounds as the
hardware does. Sums of bfloat16 stay wrong: kernels add float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def repair() -> None:
    """Repairs the interpreter of this process; a second call changes nothing. Needs triton with TRITON_INTERPRET=1."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "_moec_repaired", False):
        return
    as_bits = {
        tl.bfloat16: (torch.bfloat16, torch.uint16),
        tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
        tl.float8e5: (torch.float8_e5m2, torch.uint8),
    }
    plain = {tl.float16: torch.float16, tl.float32: torch.float32}

    def numbers(value: Any) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(value.data))
        kind = value.dtype.scalar
        return tensor.view(as_bits[kind][0]) if kind in as_bits else tensor

    def stored(tensor: torch.Tensor, kind: Any) -> Any:
        return handle((tensor.view(as_bits[kind][1]) if kind in as_bits else tensor).numpy(), kind)

    def widened(value: Any) -> Any:
        return handle(numbers(value).float().numpy(), tl.float32) if value.dtype.scalar in as_bits else value

    original_cast, original_convert = builder.cast_impl, builder.create_fp_to_fp

    def cast(self: Any, source: Any, target: Any) -> Any:
        old, new = source.dtype.scalar, target.scalar
        if (old in as_bits or new in as_bits) and {old, new} <= {*as_bits, *plain}:
            dtype = as_bits[new][0] if new in as_bits else plain[new]
            return stored(numbers(source).to(dtype), new)
        if old in as_bits:
            return original_cast(self, widened(source), target)
        if new in as_bits:
            return cast(self, original_cast(self, source, tl.float32), target)
        return original_cast(self, source, target)

    def convert(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source.dtype.scalar in as_bits or target.scalar in as_bits:
            return cast(self, source, target)
        return original_convert(self, source, target, rounding)

    def through_float32(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, *arguments: Any) -> Any:
            if arguments[0].dtype.scalar != tl.bfloat16:
                return operation(self, *arguments)
            result = operation(self, *map(widened, arguments[:-1]), arguments[-1])
            if result.data.dtype == np.bool_:
                return handle(result.data, result.dtype)
            return cast(self, handle(result.data.astype(np.float32), tl.float32), tl.bfloat16)

        return run

    original_dot = builder.create_dot

    def dot(self: Any, left: Any, right: Any, added: Any, precision: Any, accumulate: Any) -> Any:
        return original_dot(self, widened(left), widened(right), added, precision, accumulate)

    builder.cast_impl = cast
    builder.create_fp_to_fp = convert
    builder.binary_op = through_float32(builder.binary_op)
    builder.unary_op = through_float32(builder.unary_op)
    builder.create_dot = dot
    builder._moec_repaired = True
