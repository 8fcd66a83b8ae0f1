"""A packed matrix while it is emitted: its format, and its operands in whatever form they are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from moec.codegen.onnx.context import tensor_of
from moec.dialects.quant import DequantOp, Format
from moec.ir.operation import Value
from moec.ir.types import DType
from moec.quantization.packed import OPERANDS

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class PackedMatrix(Generic[T]):
    """A matrix [rows, columns] as `quant.dequant` takes it; `operands` are those that the format has, by name.

    `number_type` is the element type of the scales.
    """

    format: Format
    rows: int
    columns: int
    number_type: DType
    operands: tuple[tuple[str, T], ...]

    def __getitem__(self, name: str) -> T:
        return dict(self.operands)[name]

    def get(self, name: str) -> T | None:
        """The operand called `name`, None where the format has none."""
        return dict(self.operands).get(name)

    def map(self, convert: Callable[[str, T], U]) -> PackedMatrix[U]:
        """The same matrix with every operand converted; `convert` takes its name, too."""
        converted = tuple((name, convert(name, value)) for name, value in self.operands)
        return PackedMatrix(self.format, self.rows, self.columns, self.number_type, converted)


def packed_matrix(op: DequantOp) -> PackedMatrix[Value]:
    """The matrix of a `quant.dequant`."""
    rows, columns = tensor_of(op.weight).static_shape
    operands = tuple((name, value) for name in OPERANDS if (value := getattr(op, name)) is not None)
    return PackedMatrix(op.format, rows, columns, tensor_of(op.scales).dtype, operands)
