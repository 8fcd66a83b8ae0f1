"""Linear maps x -> W x + b wherever they stand: in the function, in a dense block, in the body of a class of experts.

A change of a map gives the operation weights of its own and makes it an `aten.linear`; its result stays the same value.
Of a class of experts, every expert's slice of a stack changes; in memory is one at a time. New weights are kept in
float64, behind a cast to the type of the module, so that float64 runs see no rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from moec.dialects.aten import AtenOp
from moec.dialects.builtin import WeightOp
from moec.dialects.moe import ExpertsOp
from moec.dialects.nn import MLPOp
from moec.experts.parts import erase_unused, new_weight, store_unrounded
from moec.ir import Block, BlockArgument, Operation, TensorType, Value
from moec.passes.matching import made_by, shape, tensor
from moec.weights.context import WeightContext
from moec.weights.tensor_spec import TensorSpec

_PERMUTES = ("permute.default", "t.default", "transpose.int")
_INPUT = {"linear.default": "input", "addmm.default": "mat1", "mm.default": "self", "matmul.default": "self"}
_WEIGHT = {"linear.default": "weight", "addmm.default": "mat2", "mm.default": "mat2", "matmul.default": "other"}
_BIAS = {"linear.default": "bias", "addmm.default": "self"}
# rows of a matrix that are in memory at a time, in bytes of float64
_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Source:
    """A tensor that an operation reads. `holder` is the `nn.mlp` or `moe.experts` whose body argument it is, with the
    number of the region; `stacked` if each expert reads its own slice of the first axis."""

    weight: WeightOp
    transposed: bool = False
    holder: tuple[MLPOp | ExpertsOp, int] | None = None
    stacked: bool = False


@dataclass(frozen=True)
class LinearMap:
    """One operation that multiplies its last axis by a fixed matrix [out, in] and adds a fixed vector or nothing."""

    op: AtenOp
    weight: Source
    bias: Source | None

    @property
    def input(self) -> Value:
        """The value whose last axis is multiplied."""
        return self.op.tensor(_INPUT[_short(self.op)])

    @property
    def anchor(self) -> Operation:
        """The operation of the function that this is, or is part of."""
        return self.op if self.weight.holder is None else self.weight.holder[0]


def _short(op: Operation) -> str:
    return op.name.removeprefix("aten.")


def linear_map(op: Operation) -> LinearMap | None:
    """The operation as a linear map of its last axis, None for anything else."""
    if not isinstance(op, AtenOp) or _short(op) not in _INPUT:
        return None
    name = _short(op)
    if name == "addmm.default" and (op.argument("beta"), op.argument("alpha")) != (1, 1):
        return None
    matrix = op.tensor(_WEIGHT[name])
    if len(shape(matrix)) != 2:
        return None
    weight = source_of(matrix)
    if weight is None:
        return None
    if name != "linear.default":
        weight = replace(weight, transposed=not weight.transposed)
    bias = None
    for value in op.tensors(_BIAS[name]) if name in _BIAS else ():
        bias = source_of(value)
        if bias is None or len(shape(value)) != 1:
            return None
    return LinearMap(op, weight, bias)


def source_of(value: Value) -> Source | None:
    """Where a matrix or vector comes from, looking through one transposition; None where it is computed."""
    permute = made_by(value, *_PERMUTES)
    if permute is not None and len(shape(value)) == 2:
        inner = source_of(permute.operands[0])
        return None if inner is None else replace(inner, transposed=not inner.transposed)
    if isinstance(value.defining_op, WeightOp):
        return Source(value.defining_op)
    if not isinstance(value, BlockArgument) or value.block.parent is None:
        return None
    holder = value.block.parent.parent
    if not isinstance(holder, MLPOp | ExpertsOp) or value.index == 0:
        return None
    number = holder.regions.index(value.block.parent)
    given, stacks = _operands_of(holder, number)
    weight = given[value.index - 1].defining_op
    if not isinstance(weight, WeightOp):
        return None
    return Source(weight, holder=(holder, number), stacked=value.index - 1 < stacks)


def _operands_of(holder: MLPOp | ExpertsOp, number: int) -> tuple[tuple[Value, ...], int]:
    """(weights of a region, how many of them are stacks)."""
    if isinstance(holder, MLPOp):
        return holder.weights, 0
    group, weights, _ = list(holder.class_operands())[number]
    return weights, group.stacks


@dataclass(frozen=True)
class Change:
    """New numbers for a map. Both functions take and give float64 tensors.

    `matrix`: [out, in] from [out, in]; `by_rows` if each row of the result needs that row alone. `bias`: [out] or None
    from the old matrix [out, in] and the old bias [out] or None. The result has `fewer_inputs` columns less than the
    old matrix, and `fewer_outputs` rows.
    """

    matrix: Callable[[torch.Tensor], torch.Tensor]
    bias: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor | None]
    by_rows: bool
    fewer_inputs: int = 0
    fewer_outputs: int = 0


def rewrite_map(found: LinearMap, change: Change, weights: WeightContext) -> None:
    """Makes the operation an `aten.linear` with changed weights, of another number of inputs or outputs if the change
    says so; the types of other operations are left to the caller."""
    op, kind = found.op, tensor(found.op.results[0])
    matrices, vectors = _changed(found, change, weights)
    weight_name = found.weight.weight.weight_name
    bias_name = f"{weight_name.removesuffix('.weight')}.bias" if found.bias is None else found.bias.weight.weight_name
    operands = {"input": found.input, "weight": _operand(found, weight_name, matrices, weights)}
    if vectors is not None:
        operands["bias"] = _operand(found, bias_name, vectors, weights)
    old = op.operands
    op.name = "aten.linear.default"
    op.attributes = {"operand_layout": tuple(operands)}
    op.set_operands(list(operands.values()))
    op.results[0].type = TensorType((*kind.shape[:-1], shape(operands["weight"])[0]), kind.dtype)
    for value in old:
        if value.defining_op is not None:
            erase_unused(value.defining_op)
    if found.weight.holder is not None:
        drop_unused(*found.weight.holder)


def _changed(
    found: LinearMap, change: Change, weights: WeightContext
) -> tuple[list[_Parts], list[torch.Tensor] | None]:
    """New matrices and biases, one for each slice of a stack, else one."""
    count = slice_count(found)
    matrices = [_Parts(found, change, weights, number) for number in range(count)]
    biases = []
    for part in matrices:
        bias = None if found.bias is None else load_vector(found.bias, weights, part.number)
        biases.append(_bias_by_rows(part, change, bias) if change.by_rows else change.bias(part.whole(), bias))
    kept = [bias for bias in biases if bias is not None]
    return matrices, kept if len(kept) == len(biases) else None


def _bias_by_rows(part: _Parts, change: Change, bias: torch.Tensor | None) -> torch.Tensor | None:
    found, start = [], 0
    for rows in part.rows():
        stop = start + len(rows)
        found.append(change.bias(rows, None if bias is None else bias[start:stop]))
        start = stop
    kept = [item for item in found if item is not None]
    return torch.cat(kept) if len(kept) == len(found) else None


def slice_count(found: LinearMap) -> int:
    """How many matrices the map has: experts of a class, else one."""
    sources = [found.weight] if found.bias is None else [found.weight, found.bias]
    stacked = [source for source in sources if source.stacked]
    return shape(stacked[0].weight.value)[0] if stacked else 1  # type: ignore[return-value]


@dataclass(frozen=True)
class _Parts:
    """One matrix of a map, of slice `number` where it is a stack."""

    found: LinearMap
    change: Change
    weights: WeightContext
    number: int

    @property
    def new_shape(self) -> tuple[int, ...]:
        """[out, in] of the new matrix."""
        outputs, inputs = tensor(self.found.weight.weight.value).static_shape[-2:]
        if self.found.weight.transposed:
            outputs, inputs = inputs, outputs
        return (outputs - self.change.fewer_outputs, inputs - self.change.fewer_inputs)

    def whole(self) -> torch.Tensor:
        """The old matrix [out, in], float64."""
        return load_matrix(self.found.weight, self.weights, self.number)

    def rows(self) -> Iterator[torch.Tensor]:
        """The old matrix in parts of rows."""
        source = self.found.weight
        if source.stacked or source.transposed:
            yield self.whole()
            return
        expression = self.weights.unrounded(source.weight.source)
        outputs, inputs = shape(source.weight.value)
        assert isinstance(outputs, int) and isinstance(inputs, int)
        step = max(1, _CHUNK_BYTES // (8 * inputs))
        for start in range(0, outputs, step):
            yield self.weights.load(expression, slice(start, min(start + step, outputs))).double()

    def new_rows(self) -> Iterator[torch.Tensor]:
        """The new matrix in parts of rows."""
        if self.change.by_rows:
            yield from map(self.change.matrix, self.rows())
        else:
            yield self.change.matrix(self.whole())


def load_matrix(source: Source, weights: WeightContext, number: int = 0) -> torch.Tensor:
    """A matrix [out, in] as the operation reads it, float64; of a stack, the slice `number`."""
    expression = weights.unrounded(source.weight.source)
    found = weights.load(expression, number) if source.stacked else weights.load(expression)
    return found.T.double() if source.transposed else found.double()


def load_vector(source: Source, weights: WeightContext, number: int = 0) -> torch.Tensor:
    """A vector, float64; of a stack, the row `number`."""
    expression = weights.unrounded(source.weight.source)
    return (weights.load(expression, number) if source.stacked else weights.load(expression)).double()


def _operand(found: LinearMap, name: str, parts: list[_Parts] | list[torch.Tensor], weights: WeightContext) -> Value:
    """The new tensor as a value that the operation may read."""
    first = parts[0]
    sizes = first.new_shape if isinstance(first, _Parts) else tuple(first.shape)
    stacked = found.weight.stacked or (found.bias is not None and found.bias.stacked)
    dtype = tensor(found.weight.weight.value).dtype

    def numbers() -> Iterator[torch.Tensor]:
        for part in parts:
            for piece in part.new_rows() if isinstance(part, _Parts) else [part]:
                yield piece.contiguous()

    spec = TensorSpec((len(parts), *sizes) if stacked else sizes, torch.float64)
    value = new_weight(found.anchor, name, store_unrounded(weights, spec, numbers(), dtype), spec.shape, dtype)
    if found.weight.holder is None:
        return value
    return add_operand(*found.weight.holder, value, stacked)


def add_operand(holder: MLPOp | ExpertsOp, number: int, value: Value, stacked: bool) -> BlockArgument:
    """Gives a body one more weight, behind its other stacks or behind all; the argument that it is inside."""
    given, stacks = _operands_of(holder, number)
    at = stacks if stacked else len(given)
    kind = tensor(value)
    inner = TensorType(kind.shape[1:], kind.dtype) if stacked else kind
    block = holder.regions[number].block
    argument = _insert_argument(block, at + 1, inner)
    _set_weights(holder, number, (*given[:at], value, *given[at:]), stacks + stacked)
    return argument


def _insert_argument(block: Block, index: int, kind: TensorType) -> BlockArgument:
    argument = BlockArgument(kind, block, index)
    block.arguments.insert(index, argument)
    for position, other in enumerate(block.arguments):
        other.index = position
    return argument


def _set_weights(holder: MLPOp | ExpertsOp, number: int, given: tuple[Value, ...], stacks: int) -> None:
    if isinstance(holder, MLPOp):
        holder.set_operands([holder.x, *given])
        holder.attributes["operandSegmentSizes"] = (1, len(given))
        return
    classes = list(holder.classes)
    every = [weights for _, weights, _ in holder.class_operands()]
    every[number] = given
    classes[number] = replace(classes[number], operands=len(given), shared=len(given) - stacks)
    flat = [value for weights in every for value in weights]
    holder.set_operands([holder.x, holder.ids, holder.gates, *flat])
    holder.attributes["operandSegmentSizes"] = (1, 1, 1, len(flat))
    holder.classes = tuple(classes)


def drop_unused(holder: MLPOp | ExpertsOp, number: int) -> None:
    """Takes weights from a body that nothing in it reads any more, but the last one of a class of experts."""
    block = holder.regions[number].block
    given, stacks = _operands_of(holder, number)
    for argument in reversed(block.arguments[1:]):
        if not argument.uses:
            at = argument.index - 1
            block.erase_argument(argument.index)
            stacks -= at < stacks
            given = (*given[:at], *given[at + 1 :])
    dropped = [value for value in _operands_of(holder, number)[0] if value not in given]
    _set_weights(holder, number, given, stacks)
    for value in dropped:
        if value.defining_op is not None:
            erase_unused(value.defining_op)
