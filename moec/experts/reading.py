"""Loads one stored expert by following the body of its class with the expert's own weights.

What the body does to weights alone (transposing, slicing) is done to them here; products of rows and weights become
projections; what lies between two projections becomes the activation. So any spelling of an expert is read, and
whatever is not two projections with an elementwise function between them is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from moec.dialects.aten import AtenOp
from moec.dialects.builtin import ConstantOp, WeightOp
from moec.dialects.quant import DequantOp
from moec.errors import UnsupportedModelError
from moec.experts.activation import columns_of, read_activation
from moec.experts.expert import (
    Activation,
    Affine,
    Banded,
    Constant,
    Dense,
    Expert,
    FeedForward,
    LowRank,
    Offset,
    PartlyLowRank,
    Projection,
    Quantized,
    kernel_frame,
)
from moec.experts.layer import MoeLayer
from moec.experts.origin import Given, loaded_from
from moec.ir import Block, Operation, Value
from moec.quantization.packed import OPERANDS, Packed
from moec.reference.kernels import prepare
from moec.weights.context import WeightContext

_PRODUCTS = frozenset({"aten.linear.default", "aten.matmul.default", "aten.mm.default", "aten.addmm.default"})
_COLUMNS = frozenset({"aten.slice.Tensor", "aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default"})


class UnreadableExpertError(UnsupportedModelError):
    """The body of an expert is nothing that passes can take apart."""


def load_expert(layer: MoeLayer, weights: WeightContext, expert: int, dtype: torch.dtype = torch.float32) -> Expert:
    """The stored expert `expert` with its tensors in `dtype` (float32 or float64).

    Raises UnreadableExpertError where the body of its class is something else than the kinds of `Expert`, UsageError
    for a weight that cannot be loaded.
    """
    for group, stacks, region in layer.experts.class_operands():
        if expert in group.experts:
            row = group.experts.index(expert)
            operands = [(stack, row if position < group.stacks else None) for position, stack in enumerate(stacks)]
            return load_body(layer.name, region.block, operands, weights, dtype=dtype, shared=group.shared)
    raise UnreadableExpertError(f"there is no stored expert {expert}", where=layer.name)


def load_body(
    name: str,
    block: Block,
    operands: Sequence[tuple[Value, int | None]],
    weights: WeightContext,
    *,
    dtype: torch.dtype,
    shared: int = 0,
) -> Expert:
    """The expert that `block` computes from its `operands`: weights, or one row of each; the last `shared` are shared.

    `name` is for messages. Raises as `load_expert`.
    """
    given = []
    for (value, row), argument in zip(operands, block.arguments[1:], strict=True):
        weight = value.defining_op
        if not isinstance(weight, WeightOp):
            raise UnreadableExpertError("a weight of the experts is computed", where=name)
        tensor = weights.load(weight.source, row)
        # parts of packed matrices keep the types that they are stored in
        is_part = any(isinstance(user, DequantOp) for user in argument.users)
        given.append(Given(tensor if is_part else tensor.to(dtype), weight, row))
    first_shared = len(block.arguments) - shared
    return _Reader(name, block, given, frozenset(block.arguments[first_shared:]), dtype).expert()


@dataclass(frozen=True)
class _Projected:
    """A value that is a projection of the rows `rows`."""

    rows: Value
    projection: Projection


class _Reader:
    def __init__(
        self, name: str, block: Block, given: list[Given], shared: frozenset[Value], dtype: torch.dtype
    ) -> None:
        self._name = name
        self._block = block
        self._given = given
        self._dtype = dtype
        self._rows = block.arguments[0]
        self._weights: dict[Value, torch.Tensor] = {
            argument: item.tensor for argument, item in zip(block.arguments[1:], given, strict=True)
        }
        self._shared = set(shared)
        # packed matrices that nothing but products has read so far
        self._packed: dict[Value, Quantized | Banded] = {}
        self._projected: dict[Value, _Projected] = {}
        # products with a weight that is shared
        self._of_shared: set[Value] = set()
        # columns of hidden activations
        self._cuts: dict[Value, AtenOp] = {}

    def expert(self) -> Expert:
        for op in self._block:
            if op is not self._block.last:
                self._follow(op)
        result = self._block.terminator.operands[0]
        if result in self._weights:
            value = self._weights[result].reshape(-1).clone()
            return Constant(value, loaded_from([value], self._given))
        found = self._projected.get(result)
        if found is None:
            raise self._refusal("its result is no projection")
        matrix = found.projection.matrix
        if found.rows is self._rows:
            bias = found.projection.bias
            if not isinstance(matrix, LowRank) or matrix.base is not None or bias is None:
                raise self._refusal("it is one linear map")
            return Affine(matrix.left, matrix.right, bias, loaded_from([matrix.left, matrix.right, bias], self._given))
        activation, gate, up = self._activation(found.rows)
        tensors = [tensor for item in (gate, up, found.projection) if item is not None for tensor in _tensors(item)]
        return FeedForward(activation, gate, up, found.projection, loaded_from(tensors, self._given))

    def _follow(self, op: Operation) -> None:
        if isinstance(op, ConstantOp):
            return
        if isinstance(op, DequantOp):
            self._dequant(op)
            return
        if op.name == "aten.cat.default" and isinstance(op, AtenOp) and self._bands(op):
            return
        if op.name != _LINEAR:
            # anything else reads it as it is, multiplied out
            self._weights.update({value: self._packed[value].dense() for value in op.operands if value in self._packed})
        if op.operands and all(value in self._weights for value in op.operands):
            results = self._compute(op, [self._weights[value] for value in op.operands])
            self._weights.update(zip(op.results, results, strict=True))
            self._shared.update(op.results if all(value in self._shared for value in op.operands) else ())
        elif isinstance(op, AtenOp) and op.name in _PRODUCTS:
            self._product(op)
        elif isinstance(op, AtenOp) and op.name in _COLUMNS and op.operands[0] in self._projected:
            self._columns(op)
        elif isinstance(op, AtenOp) and op.name == "aten.slice.Tensor":
            self._cuts[op.result] = op
        elif isinstance(op, AtenOp) and op.name == "aten.cat.default":
            self._join(op)
        elif isinstance(op, AtenOp) and op.name == "aten.add.Tensor":
            self._sum(op)

    def _dequant(self, op: DequantOp) -> None:
        parts = {name: value for name in OPERANDS if (value := getattr(op, name)) is not None}
        if not all(value in self._weights for value in parts.values()):
            raise self._refusal("a packed matrix of it is computed")
        packed = Packed(op.format, op.columns, **{name: self._weights[value] for name, value in parts.items()})
        packed.require(self._name)
        self._packed[op.weight] = Quantized(packed, self._dtype, op.table in self._shared)
        self._shared.update([op.weight] if all(value in self._shared for value in parts.values()) else ())

    def _bands(self, op: AtenOp) -> bool:
        """Whether packed matrices are joined to one."""
        parts = [self._packed.get(value) for value in op.tensors("tensors")]
        axis = op.argument("dim")
        packed = tuple(part for part in parts if isinstance(part, Quantized))
        if len(packed) < len(parts) or not isinstance(axis, int):
            return False
        self._packed[op.result] = Banded(packed, axis % 2)
        return True

    def _product(self, op: AtenOp) -> None:
        bias: Value | None = None
        if op.name == "aten.linear.default":
            left, right = op.tensor("input"), op.tensor("weight")
            bias = next(iter(op.tensors("bias")), None)
        elif op.name == "aten.addmm.default":
            left, right, bias = op.tensor("mat1"), op.tensor("mat2"), op.tensor("self")
            if op.argument("alpha") != 1 or op.argument("beta") != 1:
                raise self._refusal("it scales an addmm")
        else:
            left, right = op.operands
        if left in self._weights or (bias is not None and bias not in self._weights):
            return
        if right in self._shared:
            self._of_shared.add(op.results[0])
        if right in self._packed and right not in self._weights:
            projection = Projection(self._packed[right], None if bias is None else self._weights[bias].reshape(-1))
            self._projected[op.results[0]] = _Projected(left, projection)
            return
        if right not in self._weights:
            return
        weight = self._weights[right] if op.name == "aten.linear.default" else self._weights[right].T
        matrix: Dense | LowRank = Dense(weight)
        rows = left
        inner = self._projected.get(left)
        if inner is not None and isinstance(inner.projection.matrix, Dense) and inner.projection.bias is None:
            inner_weight = inner.projection.matrix.weight
            right_shared = self._is_shared(inner_weight)
            matrix = LowRank(weight, inner_weight, None, right in self._shared, right_shared)
            rows = inner.rows
        projection = Projection(matrix, None if bias is None else self._weights[bias].reshape(-1))
        self._projected[op.results[0]] = _Projected(rows, projection)

    def _is_shared(self, tensor: torch.Tensor) -> bool:
        return any(self._weights.get(value) is tensor for value in self._shared)

    def _columns(self, op: AtenOp) -> None:
        """Some columns of a projection are the projection by some rows of its matrix."""
        source = self._projected[op.operands[0]]
        matrix, bias = source.projection.matrix, source.projection.bias
        if not isinstance(matrix, Dense | LowRank) or (isinstance(matrix, LowRank) and matrix.base is not None):
            return
        outer = matrix.weight if isinstance(matrix, Dense) else matrix.left
        parts = self._compute(op, [outer.T])
        biases = [None] * len(parts) if bias is None else [b[0] for b in self._compute(op, [bias[None]])]
        for result, part, cut in zip(op.results, parts, biases, strict=True):
            rows = part.T
            chosen: Dense | LowRank = Dense(rows) if isinstance(matrix, Dense) else replace(matrix, left=rows)
            self._projected[result] = _Projected(source.rows, Projection(chosen, cut))

    def _join(self, op: AtenOp) -> None:
        """Whole rows of a matrix above rows of low rank."""
        parts = [self._projected.get(value) for value in op.tensors("tensors")]
        if len(parts) != 2 or parts[0] is None or parts[1] is None or op.argument("dim") not in (1, -1):
            return
        whole, rest = parts[0].projection, parts[1].projection
        if not isinstance(whole.matrix, Dense) or not isinstance(rest.matrix, LowRank) or rest.matrix.base is not None:
            return
        if parts[0].rows is not parts[1].rows or (whole.bias is None) != (rest.bias is None):
            return
        bias = None if whole.bias is None or rest.bias is None else torch.cat([whole.bias, rest.bias])
        matrix = PartlyLowRank(whole.matrix.weight, rest.matrix, 0)
        self._projected[op.result] = _Projected(parts[0].rows, Projection(matrix, bias))

    def _sum(self, op: AtenOp) -> None:
        """A shared base plus what one expert adds to it, or whole columns of a matrix plus columns of low rank."""
        if any(value not in self._projected for value in op.operands):
            return
        if self._offset(op):
            return
        base, more = (self._projected[value] for value in op.operands)
        if isinstance(base.projection.matrix, LowRank):
            base, more = more, base
        source = self._whole_of(base.rows, more.rows)
        dense, factors = base.projection.matrix, more.projection.matrix
        if (
            not isinstance(dense, Dense)
            or not isinstance(factors, LowRank)
            or factors.base is not None
            or base.projection.bias is not None
            or op.argument("alpha") != 1
        ):
            return
        if source is not None:
            columns = PartlyLowRank(dense.weight, factors, 1)
            self._projected[op.results[0]] = _Projected(source, Projection(columns, more.projection.bias))
            return
        if base.rows is not more.rows:
            return
        matrix = replace(factors, base=dense.weight)
        self._projected[op.results[0]] = _Projected(base.rows, Projection(matrix, more.projection.bias))

    def _offset(self, op: AtenOp) -> bool:
        """Whether the sum is that of a shared base and a packed matrix."""
        shared = [value for value in op.operands if value in self._of_shared]
        own = [value for value in op.operands if value not in self._of_shared]
        if len(shared) != 1 or len(own) != 1 or op.argument("alpha") != 1:
            return False
        base, more = self._projected[shared[0]], self._projected[own[0]]
        first, second = base.projection.matrix, more.projection.matrix
        if not isinstance(first, Dense | Quantized) or not isinstance(second, Quantized):
            return False
        if base.rows is not more.rows or base.projection.bias is not None:
            return False
        self._projected[op.results[0]] = _Projected(base.rows, Projection(Offset(first, second), more.projection.bias))
        return True

    def _whole_of(self, first: Value, second: Value) -> Value | None:
        """What two values are the first and the last columns of; None where they are not."""
        cuts = [self._cuts.get(first), self._cuts.get(second)]
        if cuts[0] is None or cuts[1] is None or cuts[0].operands[0] is not cuts[1].operands[0]:
            return None
        source = cuts[0].operands[0]
        border = columns_of(first)
        spans = [(cut.argument("dim"), cut.argument("start") or 0, cut.argument("step")) for cut in cuts if cut]
        whole = [(1, 0, 1), (1, border, 1)]
        sizes = (border, columns_of(second), columns_of(source))
        if spans != whole or not all(isinstance(size, int) for size in sizes):
            return None
        return source if sizes[0] + sizes[1] == sizes[2] else None  # type: ignore[operator]

    def _compute(self, op: Operation, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The kernel of the executor on other values than those of a run."""
        frame = kernel_frame(self._dtype, {"tokens": 1})
        frame.values.update(zip(op.operands, tensors, strict=True))
        return list(prepare(op)(frame))

    # -- activation --------------------

    def _activation(self, hidden: Value) -> tuple[Activation, Projection | None, Projection]:
        ops: dict[Operation, None] = {}
        leaves: dict[Value, Projection] = {}
        self._collect(hidden, ops, leaves)
        if not 1 <= len(leaves) <= 2:
            raise self._refusal(f"its activation combines {len(leaves)} projections")
        try:
            activation, values = read_activation(hidden, [op for op in self._block if op in ops], list(leaves))
        except ValueError as error:
            raise self._refusal(str(error)) from None
        gate = leaves[values[0]] if len(values) == 2 else None
        return activation, gate, leaves[values[-1]]

    def _collect(self, value: Value, ops: dict[Operation, None], leaves: dict[Value, Projection]) -> None:
        found = self._projected.get(value)
        if found is not None:
            if found.rows is not self._rows:
                raise self._refusal("it has more than two products in a row")
            leaves[value] = found.projection
            return
        op = value.defining_op
        if op is None or value in self._weights:
            raise self._refusal("its activation reads rows or weights")
        if op in ops:
            return
        if not isinstance(op, ConstantOp) and not isinstance(op, AtenOp):
            raise self._refusal(f"its activation has {op.name}")
        for operand in op.operands:
            self._collect(operand, ops, leaves)
        ops[op] = None

    def _refusal(self, reason: str) -> UnreadableExpertError:
        return UnreadableExpertError(
            f"the experts of this layer cannot be taken apart: {reason}",
            where=self._name,
            hint="passes change experts that are two projections with an elementwise function between them",
        )


_LINEAR = "aten.linear.default"


def _tensors(projection: Projection) -> list[torch.Tensor]:
    matrix = projection.matrix
    found: list[torch.Tensor] = []
    if isinstance(matrix, Offset):
        return [*_tensors(Projection(matrix.base)), *_tensors(Projection(matrix.delta, projection.bias))]
    if isinstance(matrix, PartlyLowRank):
        found, matrix = [matrix.whole], matrix.rest
    if isinstance(matrix, Quantized | Banded):
        parts = matrix.parts if isinstance(matrix, Banded) else (matrix,)
        found += [tensor for part in parts for tensor in part.packed.tensors().values()]
    else:
        found += [matrix.weight] if isinstance(matrix, Dense) else [matrix.left, matrix.right]
    if isinstance(matrix, LowRank) and matrix.base is not None:
        found.append(matrix.base)
    return found if projection.bias is None else [*found, projection.bias]
