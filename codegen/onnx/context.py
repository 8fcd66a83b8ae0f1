"""What emission knows while it walks the IR: which ONNX value stands for which IR value, sizes at run time, weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch

from moec.artifact.options import Activations
from moec.codegen.onnx.cost_model import Lowering
from moec.codegen.onnx.external_data import FileRange, StoredTensor
from moec.codegen.onnx.graph import GraphBuilder
from moec.codegen.onnx.targets import Target
from moec.dialects.builtin import ConstantOp, WeightOp
from moec.errors import UnsupportedModelError
from moec.ir.dimensions import DimExpr
from moec.ir.operation import Operation, Value
from moec.ir.types import DType, TensorType
from moec.weights.context import WeightContext
from moec.weights.expression import Cast, Expression, Transpose
from moec.weights.expression_parser import parse_expression

if TYPE_CHECKING:
    from moec.codegen.onnx.common_experts import CommonExperts
    from moec.codegen.onnx.expert_plan import ExpertsPlan
    from moec.codegen.onnx.fallback_function import FallbackForm
    from moec.codegen.onnx.lower_moe import LayerLowering
    from moec.codegen.onnx.packed.kernel import KernelProducts

NUMPY_DTYPES = {
    DType.F64: np.float64,
    DType.F32: np.float32,
    DType.F16: np.float16,
    DType.I64: np.int64,
    DType.I32: np.int32,
    DType.I16: np.int16,
    DType.I8: np.int8,
    DType.U8: np.uint8,
    DType.I1: np.bool_,
}
FLOAT16_MAX = 65504.0
PIECE_BYTES = 64 << 20


@dataclass(frozen=True)
class EmitOptions:
    """Choices that hold for a whole file."""

    target: Target
    dtype: DType = DType.F32
    weights_in_place: bool = False
    # expected tokens in one run, for which a lowering is chosen
    tokens: int = 1
    # one lowering for all layers, whatever the cost model says
    lowering: Lowering | None = None
    # what packed weights are multiplied with, where the target has an operator for them
    activations: Activations = Activations.FLOAT32
    # bytes of the pages on which experts lie in a file of their own; 0: they lie among the other weights
    page_bytes: int = 0
    # the weights are stored once more, as the runtime's kernels arrange them
    prepacked: bool = False


@dataclass(frozen=True)
class NamedWeight:
    """A weight expression, and what the weight is called in the source model."""

    expression: Expression
    name: str


@dataclass
class Context:
    """Maps IR values to ONNX values. `sizes` maps each symbol to a one-element int64 tensor."""

    builder: GraphBuilder
    weights: WeightContext
    options: EmitOptions
    values: dict[Value, ir.Value] = field(default_factory=dict)
    # values that are emitted when something reads them: packed weights, which most readers take as they are
    late_values: dict[Value, Callable[[], ir.Value]] = field(default_factory=dict)
    # arguments of a region that stand for a value outside
    aliases: dict[Value, Value] = field(default_factory=dict)
    sizes: dict[str, ir.Value] = field(default_factory=dict)
    # sizes that are computed where they are first read
    late_sizes: dict[str, Callable[[], ir.Value]] = field(default_factory=dict)
    # weights that an embedding reads row by row; a linear layer of the same weight must not store it again, transposed
    gathered: frozenset[str] = frozenset()

    # shared by all contexts of a file: how each layer was lowered, and the functions that the file needs
    lowerings: list[LayerLowering] = field(default_factory=list)
    fallbacks: list[FallbackForm] = field(default_factory=list)
    functions: dict[str, ir.Function] = field(default_factory=dict)
    # the names of the functions that compute products with packed matrices
    products: dict[KernelProducts, str] = field(default_factory=dict)
    # layers that have experts in common, within themselves or with others
    common: dict[Operation, CommonExperts] = field(default_factory=dict)
    # decided before emission: each layer of experts, additions that a fused node computes too, and what is part of one
    plans: dict[Operation, ExpertsPlan] = field(default_factory=dict)
    taken_over: dict[Operation, Callable[[Context, Operation], tuple[ir.Value, ...]]] = field(default_factory=dict)
    skipped: set[Operation] = field(default_factory=set)

    def nested(self, sizes: dict[str, Callable[[], ir.Value]]) -> Context:
        """A context for a region: its own values, more sizes, the same graph and weights."""
        known = {name: value for name, value in self.sizes.items() if name not in sizes}
        late = {**self.late_sizes, **sizes}
        return replace(self, values=dict(self.values), aliases=dict(self.aliases), sizes=known, late_sizes=late)

    # values

    def value(self, value: Value) -> ir.Value:
        """The ONNX value; weights and constants are emitted when first read."""
        value = self.aliases.get(value, value)
        found = self.values.get(value)
        if found is None:
            op = value.defining_op
            if isinstance(op, WeightOp):
                found = self.weight(parse_expression(op.source), op.weight_name)
            elif isinstance(op, ConstantOp):
                found = self.builder.constant(constant_array(op))
            elif value in self.late_values:
                found = self.late_values[value]()
            else:
                raise KeyError(value)
            self.values[value] = found
        return found

    def optional(self, value: Value | None) -> ir.Value | None:
        return None if value is None else self.value(value)

    def named_weight(self, value: Value) -> NamedWeight | None:
        """Expression and name of a value that is a weight, else None."""
        op = self.aliases.get(value, value).defining_op
        return NamedWeight(parse_expression(op.source), op.weight_name) if isinstance(op, WeightOp) else None

    # sizes

    def size(self, size: int | DimExpr) -> int | ir.Value:
        """A size as a number, or as a one-element int64 tensor computed at run time."""
        if isinstance(size, int):
            return size
        b = self.builder
        total: ir.Value | None = None
        for product, coefficient in size.terms:
            factors = [self._atom(atom) for atom in product]
            if coefficient != 1 or not factors:
                factors.append(b.ints(coefficient))
            term = factors[0]
            for factor in factors[1:]:
                term = b.op("Mul", term, factor)
            total = term if total is None else b.op("Add", total, term)
        assert total is not None
        return total

    def _atom(self, atom: str | tuple[str, int | DimExpr, int | DimExpr]) -> ir.Value:
        b = self.builder
        if isinstance(atom, str):
            if atom not in self.sizes and atom in self.late_sizes:
                self.sizes[atom] = self.late_sizes[atom]()
            found = self.sizes.get(atom)
            if found is None:
                raise UnsupportedModelError(
                    f"the size {atom!r} is not the size of any input", where="the graph's inputs"
                )
            return found
        kind, dividend, divisor = atom
        left, right = self.size_vector(dividend), self.size_vector(divisor)
        remainder = b.op("Mod", left, right)
        # Mod takes the divisor's sign, so this division is exact and rounds down as the IR's does
        return remainder if kind == "mod" else b.op("Div", b.op("Sub", left, remainder), right)

    def size_vector(self, size: int | DimExpr) -> ir.Value:
        """A size as a one-element int64 tensor."""
        found = self.size(size)
        return self.builder.ints(found) if isinstance(found, int) else found

    def shape(self, sizes: Iterable[int | DimExpr]) -> ir.Value:
        """Sizes as one int64 vector."""
        return self.builder.shape_vector([self.size(size) for size in sizes])

    def scalar(self, value: float | int | bool | DimExpr, dtype: DType) -> ir.Value:
        """A zero-dimensional tensor of a number or size."""
        if isinstance(value, DimExpr):
            b = self.builder
            return b.cast(b.op("Squeeze", self.size_vector(value), b.ints(0)), dtype)
        return self.builder.constant(np.array(value, NUMPY_DTYPES[dtype]))

    # weights

    def weight(self, expression: Expression, name: str, *, vectors: bool = False) -> ir.Value:
        """The weight as a value in the element type of the computation.

        A file in float16 stores its matrices so and casts them back where they are used: runtimes without float16
        arithmetic, ONNX Runtime's CPU provider among them, then compute in float32 and fold the cast when they load.
        Vectors, and the stacks of `vectors` that experts have, stay as they are.
        """
        shape, torch_dtype = self.weights.shape_dtype(expression)
        dtype = _dtype(torch_dtype)
        matrix = len(shape) > 1 and not vectors
        stored = DType.F16 if dtype is DType.F32 and self.options.dtype is DType.F16 and matrix else dtype
        if stored is dtype and self.options.weights_in_place:
            expression = self._without_cast(expression)
            stored = _dtype(self.weights.shape_dtype(expression)[1])
        value = self.builder.weight(str(expression), self._stored(expression, name, shape, stored))
        return value if stored is dtype else self.builder.cast(value, dtype)

    def stored_as_is(self, expression: Expression, name: str) -> ir.Value:
        """The weight in the element type that it has: scales of a packed matrix stay as they are in a float16 file."""
        shape, dtype = self.weights.shape_dtype(expression)
        return self.builder.weight(str(expression), self._stored(expression, name, shape, _dtype(dtype)))

    def run_time_zero(self) -> ir.Value:
        """int64 [1], zero, computed from what the model is fed.

        What is read at this index is not known before the model runs, so a runtime cannot unpack it when it loads.
        """
        if self.sizes:
            return self.builder.op("Min", next(iter(self.sizes.values())), self.builder.ints(0))
        flat = self.builder.reshape(self.builder.inputs[0], (-1,))
        first = self.builder.op("Slice", flat, self.builder.ints(0), self.builder.ints(1))
        return self.builder.op("ArgMax", first, axis=0, keepdims=1)

    def transposed(self, expression: Expression, name: str) -> ir.Value:
        """The matrix `expression` transposed."""
        if self.in_place(expression):
            return self.builder.op("Transpose", self.weight(expression, name), perm=[1, 0])
        if isinstance(expression, Transpose):
            return self.weight(expression.operand, name)
        return self.weight(Transpose(expression, 0, 1), f"{name}.transposed")

    def in_place(self, expression: Expression) -> bool:
        """Whether the weight will be read from its place in the checkpoint."""
        return self.options.weights_in_place and self.weights.location(self._without_cast(expression)) is not None

    def _without_cast(self, expression: Expression) -> Expression:
        """What a cast is made from, if that lies in a file as it is."""
        if isinstance(expression, Cast) and self.weights.location(expression.operand) is not None:
            wider = self.weights.shape_dtype(expression.operand)[1].itemsize > expression.dtype.itemsize
            return expression if wider else expression.operand
        return expression

    def _stored(self, expression: Expression, name: str, shape: tuple[int, ...], dtype: DType) -> StoredTensor:
        origin = None
        if self.options.weights_in_place:
            location = self.weights.location(expression)
            if location is not None and _dtype(location.spec.dtype) is dtype:
                origin = FileRange(location.path, location.offset, location.nbytes)

        def pieces() -> Iterator[torch.Tensor]:
            for piece in self.weights.chunks(expression, PIECE_BYTES):
                yield _to_float16(piece, name) if dtype is DType.F16 and piece.dtype is torch.float32 else piece

        return StoredTensor(name, shape, dtype, pieces, origin)


def constant_array(op: ConstantOp) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """The numbers of a `moec.constant`."""
    kind = op.value.type
    assert isinstance(kind, TensorType)
    return np.frombuffer(op.data.data, NUMPY_DTYPES[kind.dtype]).reshape(kind.static_shape)


def tensor_of(value: Value) -> TensorType:
    """The type of a value that is a tensor, which every value of a function is."""
    assert isinstance(value.type, TensorType)
    return value.type


def reshape_target(source: Sequence[int | DimExpr], target: Sequence[int | DimExpr]) -> list[int | DimExpr]:
    """The target shape of a Reshape with as few run-time sizes as possible.

    A symbolic size equal to the source's at the same axis becomes 0, which copies it; one that is left becomes -1.
    """
    result: list[int | DimExpr] = list(target)
    for axis, size in enumerate(target):
        if isinstance(size, DimExpr) and axis < len(source) and source[axis] == size:
            result[axis] = 0
    symbolic = [axis for axis, size in enumerate(result) if isinstance(size, DimExpr)]
    # an inferred size is ambiguous where another one may be zero
    if len(symbolic) == 1 and 0 not in target:
        result[symbolic[0]] = -1
    return result


def refuse(op: Operation, problem: str) -> UnsupportedModelError:
    """The error for an operation that has no ONNX form."""
    return UnsupportedModelError(
        f"{op.name} has no ONNX form: {problem}",
        where=str(op.location),
        hint="remove the operation from the model, or report it with the model's config",
    )


def is_small(shape: Sequence[int | DimExpr], limit: int) -> bool:
    """Whether a static shape has at most `limit` elements."""
    sizes = [size for size in shape if isinstance(size, int)]
    return len(sizes) == len(shape) and math.prod(sizes) <= limit


def _to_float16(piece: torch.Tensor, name: str) -> torch.Tensor:
    largest = float(piece.abs().max()) if piece.numel() else 0.0
    if largest > FLOAT16_MAX:
        raise UnsupportedModelError(
            f"a weight of {largest:g} does not fit float16 (largest number {FLOAT16_MAX:g})",
            where=name,
            hint="compile with --dtype float32",
        )
    return piece.to(torch.float16)


def _dtype(torch_dtype: torch.dtype) -> DType:
    return _FROM_TORCH[torch_dtype]


_FROM_TORCH = {
    torch.float64: DType.F64,
    torch.float32: DType.F32,
    torch.float16: DType.F16,
    torch.bfloat16: DType.BF16,
    torch.int64: DType.I64,
    torch.int32: DType.I32,
    torch.int16: DType.I16,
    torch.int8: DType.I8,
    torch.uint8: DType.U8,
    torch.bool: DType.I1,
}
