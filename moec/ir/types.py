"""Types of values. They are frozen and compared by value; the parser and printer cache their text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from moec.ir.dimensions import DimExpr


class DType(Enum):
    """Element types, by their MLIR spelling."""

    F64 = "f64"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    F8E4M3FN = "f8E4M3FN"
    F8E5M2 = "f8E5M2"
    C64 = "complex<f32>"
    I64 = "i64"
    I32 = "i32"
    I16 = "i16"
    I8 = "i8"
    U8 = "ui8"
    I1 = "i1"

    # Enum's own hash goes through Python code; types are hashed all the time
    __hash__ = object.__hash__

    @property
    def is_float(self) -> bool:
        return self in _FLOATS

    @property
    def is_integer(self) -> bool:
        return self in _INTEGERS

    @property
    def bytes(self) -> int:
        """Size of one stored element (a boolean takes one byte)."""
        return _BYTES[self]


_FLOATS = frozenset({DType.F64, DType.F32, DType.F16, DType.BF16, DType.F8E4M3FN, DType.F8E5M2})
_INTEGERS = frozenset({DType.I64, DType.I32, DType.I16, DType.I8, DType.U8})
_BYTES = {
    DType.F64: 8,
    DType.F32: 4,
    DType.F16: 2,
    DType.BF16: 2,
    DType.F8E4M3FN: 1,
    DType.F8E5M2: 1,
    DType.C64: 8,
    DType.I64: 8,
    DType.I32: 4,
    DType.I16: 2,
    DType.I8: 1,
    DType.U8: 1,
    DType.I1: 1,
}


class Type:
    """Base of all types."""

    __slots__ = ()


@dataclass(frozen=True)
class TensorType(Type):
    """A ranked tensor. A size is a number or an expression over symbols such as `batch`, `seq` and `past`."""

    shape: tuple[int | DimExpr, ...]
    dtype: DType

    @property
    def rank(self) -> int:
        return len(self.shape)

    @cached_property
    def is_static(self) -> bool:
        return all(isinstance(size, int) for size in self.shape)

    @cached_property
    def element_count(self) -> int | DimExpr:
        count: int | DimExpr = 1
        for size in self.shape:
            count = count * size
        return count

    @property
    def static_shape(self) -> tuple[int, ...]:
        """The shape as numbers; raises ValueError where a size is symbolic."""
        sizes = tuple(size for size in self.shape if isinstance(size, int))
        if len(sizes) != len(self.shape):
            raise ValueError(f"{self} has symbolic sizes")
        return sizes

    @property
    def nbytes(self) -> int:
        """Bytes of a static tensor."""
        return math.prod(self.static_shape) * self.dtype.bytes

    def symbols(self) -> set[str]:
        return {name for size in self.shape if isinstance(size, DimExpr) for name in size.symbols()}

    def evaluate(self, values: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for given symbol values."""
        return tuple(size.evaluate(values) if isinstance(size, DimExpr) else size for size in self.shape)

    def substitute(self, values: Mapping[str, int | DimExpr]) -> TensorType:
        """The same type with symbols replaced."""
        shape = tuple(size.substitute(values) if isinstance(size, DimExpr) else size for size in self.shape)
        return TensorType(shape, self.dtype)

    def with_dtype(self, dtype: DType) -> TensorType:
        return TensorType(self.shape, dtype)

    @cached_property
    def _text(self) -> str:
        if self.is_static:
            return "tensor<" + "".join(f"{size}x" for size in self.shape) + f"{self.dtype.value}>"
        return f"!moec.tensor<[{', '.join(str(size) for size in self.shape)}], {self.dtype.value}>"

    def __str__(self) -> str:
        return self._text


@dataclass(frozen=True)
class FunctionType(Type):
    """Argument and result types of a function."""

    inputs: tuple[Type, ...]
    results: tuple[Type, ...]

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.inputs))}) -> {result_types_text(self.results)}"


def result_types_text(types: tuple[Type, ...] | list[Type]) -> str:
    """`t` for one type, `(t, u)` for none or several and for a function type."""
    return (
        str(types[0])
        if len(types) == 1 and not isinstance(types[0], FunctionType)
        else f"({', '.join(map(str, types))})"
    )
