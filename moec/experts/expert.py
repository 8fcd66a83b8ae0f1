"""What one stored expert is: a feed-forward block with dense, factored or packed matrices, a constant, a linear map."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from moec.dialects.nn import TOKENS
from moec.ir import Block, Operation, TensorType, Value, symbol
from moec.quantization.packed import Packed
from moec.reference import aten_kernel, nn_kernels, quant_kernel
from moec.reference.element_types import ElementTypes
from moec.reference.frame import ExpertsLowering, Frame, RunSettings
from moec.reference.plan import BlockPlan, plan_block
from moec.reference.weight_loader import WeightLoader
from moec.weights.context import WeightContext
from moec.weights.expression import Expression

# imported for the kernels that they register
_KERNEL_MODULES = (aten_kernel, nn_kernels, quant_kernel)

WIDTH = symbol("width")
"""The size of an expert's hidden activations in the types of an activation's block."""


@dataclass(frozen=True)
class Activation:
    """The elementwise function between an expert's products, as the model spells it.

    `block` maps [tokens, width] values, gate (if `gated`) and up, to the hidden activations [tokens, width]; `key`
    holds the same as comparable values, so that equal functions of equal spelling are equal.
    """

    gated: bool
    key: tuple[object, ...]
    block: Block = field(compare=False, repr=False)

    @cached_property
    def _plan(self) -> BlockPlan:
        return plan_block(self.block)

    def compute(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        """Hidden activations [n, m] from gate and up [n, m]; `gate` is None where the experts have none."""
        given = [up] if gate is None else [gate, up]
        frame = kernel_frame(up.dtype, {"tokens": up.shape[0], "width": up.shape[1]})
        frame.values.update(zip(self.block.arguments, given, strict=True))
        return self._plan.run(frame)[0]

    def emit(self, block: Block, gate: Value | None, up: Value) -> Value:
        """Appends the function to `block`, for values [tokens, m]; gives the hidden activations."""
        kind = up.type
        assert isinstance(kind, TensorType)
        given = [up] if gate is None else [gate, up]
        mapping: dict[Value, Value] = dict(zip(self.block.arguments, given, strict=True))
        for op in self.block:
            if op is self.block.last:
                continue
            copy = op.clone(mapping)
            for result in copy.results:
                assert isinstance(result.type, TensorType)
                if WIDTH in result.type.shape:
                    result.type = TensorType((TOKENS, kind.shape[1]), result.type.dtype)
            block.append(copy)
        return mapping[self.block.terminator.operands[0]]


def kernel_frame(dtype: torch.dtype, symbols: dict[str, int]) -> Frame:
    """A frame for kernels of the reference executor that read no weights; `dtype` is float32 or float64."""
    types = ElementTypes(dtype)
    settings = RunSettings(types, WeightLoader(WeightContext(), types), ExpertsLowering.GROUPED)
    return Frame(settings, symbols, {})


@dataclass(frozen=True)
class Dense:
    """A matrix [out, in] as it is."""

    weight: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.weight.shape[0], self.weight.shape[1])

    def dense(self) -> torch.Tensor:
        """The matrix [out, in]."""
        return self.weight

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [n, in] times the transposed matrix."""
        return rows @ self.weight.T


@dataclass(frozen=True)
class LowRank:
    """base + left @ right: `left` [out, r], `right` [r, in], `base` [out, in] or None.

    A base is stored once for its class of experts; so are `left` and `right` where they are said to be shared.
    """

    left: torch.Tensor
    right: torch.Tensor
    base: torch.Tensor | None = None
    left_is_shared: bool = False
    right_is_shared: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.left.shape[0], self.right.shape[1])

    @property
    def rank(self) -> int:
        """r."""
        return self.right.shape[0]

    def dense(self) -> torch.Tensor:
        """The matrix [out, in]."""
        product = self.left @ self.right
        return product if self.base is None else self.base + product

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [n, in] times the transposed matrix."""
        product = (rows @ self.right.T) @ self.left.T
        return product if self.base is None else rows @ self.base.T + product


@dataclass(frozen=True)
class PartlyLowRank:
    """A matrix of which the first rows (`axis` 0) or columns (`axis` 1) are whole, and the others of low rank.

    `whole` is [k, in] or [out, k]; `rest` has the remaining rows or columns, and no base.
    """

    whole: torch.Tensor
    rest: LowRank
    axis: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        outputs, inputs = self.rest.shape
        return (outputs + len(self.whole), inputs) if self.axis == 0 else (outputs, inputs + self.whole.shape[1])

    def dense(self) -> torch.Tensor:
        """The matrix [out, in]."""
        return torch.cat([self.whole, self.rest.dense()], dim=self.axis)

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [n, in] times the transposed matrix."""
        if self.axis == 0:
            return torch.cat([rows @ self.whole.T, self.rest.apply(rows)], dim=1)
        kept = self.whole.shape[1]
        return rows[:, :kept] @ self.whole.T + self.rest.apply(rows[:, kept:])


@dataclass(frozen=True)
class Quantized:
    """A packed matrix [out, in], computed in `dtype`, float32 or float64.

    Of its tensors the table is stored once for its class of experts where it is said to be shared.
    """

    packed: Packed
    dtype: torch.dtype = torch.float32
    table_is_shared: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.packed.shape

    def dense(self) -> torch.Tensor:
        """The matrix [out, in]."""
        return self.packed.dense(self.dtype)

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [n, in] times the transposed matrix."""
        return rows @ self.dense().T


@dataclass(frozen=True)
class Banded:
    """Packed matrices one under the other (`axis` 0) or beside each other (`axis` 1), such as of unlike bits."""

    parts: tuple[Quantized, ...]
    axis: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        outputs, inputs = self.parts[0].shape
        along = sum(part.shape[self.axis] for part in self.parts)
        return (along, inputs) if self.axis == 0 else (outputs, along)

    def dense(self) -> torch.Tensor:
        """The matrix [out, in]."""
        return torch.cat([part.dense() for part in self.parts], dim=self.axis)

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [n, in] times the transposed matrix."""
        return rows @ self.dense().T


@dataclass(frozen=True)
class Offset:
    """base + delta: a matrix [out, in] that is stored once for its class of experts, and what one expert adds."""

    base: Dense | Quantized
    delta: Quantized

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.delta.shape

    def dense(self) -> torch.Tensor:
        """The matrix [out, in]."""
        return self.base.dense() + self.delta.dense()

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [n, in] times the transposed matrix."""
        return self.base.apply(rows) + self.delta.apply(rows)


Matrix = Dense | LowRank | PartlyLowRank | Quantized | Banded | Offset


@dataclass(frozen=True)
class Projection:
    """rows @ matrix^T + bias; `bias` [out] or None."""

    matrix: Matrix
    bias: torch.Tensor | None = None

    def dense(self) -> torch.Tensor:
        """The matrix [out, in], multiplied out."""
        return self.matrix.dense()

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, out] from rows [n, in]."""
        result = self.matrix.apply(rows)
        return result if self.bias is None else result + self.bias


@dataclass(frozen=True)
class Loaded:
    """Where a tensor came from: `stack[row]`, seen through `view`. Valid while nobody wrote into the tensor."""

    tensor: torch.Tensor
    version: int
    stack: Expression
    row: int | None
    view: View

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` still is what was loaded."""
        return tensor is self.tensor and tensor._version == self.version


@dataclass(frozen=True)
class View:
    """A part of a matrix: `[starts[0]:stops[0]:steps[0], starts[1]:...]`, then transposed if `transposed`.

    Vectors have one entry in each tuple.
    """

    starts: tuple[int, ...]
    stops: tuple[int, ...]
    steps: tuple[int, ...]
    transposed: bool = False


@dataclass(frozen=True)
class FeedForward:
    """down(activation(gate(x), up(x))): gate and up [m, H], down [H, m]; `gate` is None where experts have none."""

    activation: Activation
    gate: Projection | None
    up: Projection
    down: Projection
    loaded: tuple[Loaded, ...] = field(default=(), compare=False, repr=False)

    @property
    def width(self) -> int:
        """m, the hidden activations."""
        return self.down.matrix.shape[1]

    def hidden_activations(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, m] from rows [n, H]."""
        gate = None if self.gate is None else self.gate.apply(rows)
        return self.activation.compute(gate, self.up.apply(rows))

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, H] from rows [n, H]."""
        return self.down.apply(self.hidden_activations(rows))


@dataclass(frozen=True)
class Constant:
    """The vector `value` [H] for every token."""

    value: torch.Tensor
    loaded: tuple[Loaded, ...] = field(default=(), compare=False, repr=False)

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, H] from rows [n, H]."""
        return self.value.expand(rows.shape[0], -1)


@dataclass(frozen=True)
class Affine:
    """left @ right @ x + bias: `left` [H, r], `right` [r, H], `bias` [H]."""

    left: torch.Tensor
    right: torch.Tensor
    bias: torch.Tensor
    loaded: tuple[Loaded, ...] = field(default=(), compare=False, repr=False)

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, H] from rows [n, H]."""
        return (rows @ self.right.T) @ self.left.T + self.bias


Expert = FeedForward | Constant | Affine


def operation_key(op: Operation, names: dict[Value, int]) -> tuple[object, ...]:
    """An operation as comparable values; `names` numbers the values before it and is extended by its results."""
    operands = tuple(names[value] for value in op.operands)
    for result in op.results:
        names[result] = len(names)
    attributes = tuple(sorted((key, type(value).__name__, repr(value)) for key, value in op.attributes.items()))
    return (op.name, operands, attributes)
