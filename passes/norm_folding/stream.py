"""The residual stream: everything that is added up between norms, who writes to it, and which norms read it.

A stream is found from one norm, forwards and backwards through sums, factors that are the same for all channels, and
operations that only move elements, into the bodies of dense blocks and experts. If every writer is linear and every
reader a norm that ignores the mean, writers may give vectors of mean zero instead (Jiang et al. 2023, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from moec.dialects.aten import AtenOp
from moec.dialects.moe import ExpertsOp, YieldOp
from moec.dialects.nn import LayerNormOp, MLPOp, RMSNormOp
from moec.ir import Block, BlockArgument, Operation, TensorType, Value
from moec.passes.building import Builder
from moec.passes.matching import shape, tensor
from moec.passes.norm_folding.affine import axis_behind
from moec.passes.norm_folding.fixed import is_fixed
from moec.passes.norm_folding.folding import NotLinearError, readers_of
from moec.passes.norm_folding.linear_maps import (
    Change,
    LinearMap,
    linear_map,
    load_matrix,
    load_vector,
    rewrite_map,
    slice_count,
)
from moec.passes.norm_folding.terms import FixedTerm, fixed_term, rewrite_term, term_tensor
from moec.weights.context import WeightContext

_MOVES = frozenset(
    f"aten.{name}"
    for name in (
        "view.default", "reshape.default", "_unsafe_view.default", "permute.default", "transpose.int", "slice.Tensor",
        "clone.default", "contiguous.default", "alias.default", "detach.default",
    )
)  # fmt: skip
_SUMS = frozenset({"aten.add.Tensor", "aten.sub.Tensor"})
_FACTORS = frozenset({"aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Tensor", "aten.div.Scalar"})
_SIZES = {
    "aten.view.default": "size",
    "aten.reshape.default": "shape",
    "aten._unsafe_view.default": "size",
    "aten.expand.default": "size",
}
_MEAN_BOUND = 1e-7
"""Of the largest number of a writer, what the mean over its outputs may be to count as zero."""


@dataclass
class Stream:
    """Values that are added up, what writes them, and the norms that read them."""

    values: dict[Value, None] = field(default_factory=dict)
    maps: list[LinearMap] = field(default_factory=list)
    terms: list[FixedTerm] = field(default_factory=list)
    norms: list[LayerNormOp | RMSNormOp] = field(default_factory=list)

    @property
    def holders(self) -> set[Operation]:
        """Dense blocks and layers of experts that write to it."""
        return {found.weight.holder[0] for found in self.maps if found.weight.holder is not None}


@dataclass
class Rewritten:
    """How many norms changed, and why others did not."""

    norms: int = 0
    refused: list[tuple[Operation, str]] = field(default_factory=list)


def center_streams(block: Block, weights: WeightContext, untie: bool) -> Rewritten:
    """Makes every stream that layer norms read zero-mean, and the layer norms RMS norms."""

    def rewrite(stream: Stream) -> None:
        for found in stream.maps:
            rewrite_map(_again(found), _CENTRE, weights)
        for term in stream.terms:
            rewrite_term(term, weights, lambda rows: rows - rows.mean(-1, keepdim=True))
        for norm in stream.norms:
            assert isinstance(norm, LayerNormOp)
            _without_mean(norm)

    return _each_stream(block, LayerNormOp, lambda norm: True, rewrite, untie)


_CENTRE = Change(
    lambda matrix: matrix - matrix.mean(0),
    lambda matrix, bias: None if bias is None else bias - bias.mean(),
    by_rows=False,
)


def _without_mean(norm: LayerNormOp) -> None:
    new = RMSNormOp(norm.x, norm.weight, epsilon=norm.epsilon, location=norm.location)
    new.insert_before(norm)
    result: Value = new.y
    if norm.bias is not None:
        builder = Builder(lambda op: op.insert_before(norm))
        result = builder.aten("add.Tensor", {"self": result, "other": norm.bias}, tensor(norm.y))
    norm.replace_with([result])


def shorten_streams(block: Block, weights: WeightContext, untie: bool) -> Rewritten:
    """Leaves out the last channel of every zero-mean stream that RMS norms read."""

    def rewrite(stream: Stream) -> None:
        readers = _Readers()
        for norm in stream.norms:
            readers.follow(norm.y)
        if readers.holders != stream.holders:
            op = next(iter(readers.holders ^ stream.holders))
            raise NotLinearError(op, "reads the stream or writes to it, but not both")
        for found in stream.maps:
            _require_mean_zero(found, weights)
        for term in stream.terms:
            if _is_off_centre(term_tensor(term, weights)):
                raise NotLinearError(term.op, "does not write vectors of mean zero")
        for found in readers.maps:
            rewrite_map(_again(found), _READ_FEWER, weights)
        for found in stream.maps:
            rewrite_map(_again(found), _WRITE_FEWER, weights)
        for term in stream.terms:
            rewrite_term(term, weights, lambda rows: rows[..., :-1])
        for value in (*stream.values, *readers.values):
            _retype(value)
        for norm in stream.norms:
            assert isinstance(norm, RMSNormOp)
            norm.zero_sum = True

    return _each_stream(block, RMSNormOp, lambda norm: not norm.attributes.get("zero_sum", False), rewrite, untie)


_READ_FEWER = Change(lambda matrix: matrix[:, :-1] - matrix[:, -1:], lambda _, bias: bias, by_rows=True, fewer_inputs=1)
_WRITE_FEWER = Change(
    lambda matrix: matrix[:-1], lambda _, bias: None if bias is None else bias[:-1], by_rows=False, fewer_outputs=1
)


def _again(found: LinearMap) -> LinearMap:
    current = linear_map(found.op)
    assert current is not None
    return current


def _require_mean_zero(found: LinearMap, weights: WeightContext) -> None:
    for number in range(slice_count(found)):
        numbers = [load_matrix(found.weight, weights, number).T]
        if found.bias is not None:
            numbers.append(load_vector(found.bias, weights, number))
        if any(map(_is_off_centre, numbers)):
            raise NotLinearError(found.op, "does not write vectors of mean zero")


def _is_off_centre(rows: torch.Tensor) -> bool:
    return float(rows.mean(-1).abs().max()) > _MEAN_BOUND * float(rows.abs().max())


def _each_stream(
    block: Block,
    kind: type[LayerNormOp] | type[RMSNormOp],
    wanted: Callable[[LayerNormOp | RMSNormOp], bool],
    rewrite: Callable[[Stream], None],
    untie: bool,
) -> Rewritten:
    """Finds the streams that norms of a kind read, and rewrites those that can be."""
    result = Rewritten()
    seen: set[Operation] = set()
    for norm in [op for op in block if isinstance(op, kind)]:
        if norm in seen or not wanted(norm):
            continue
        stream = Stream()
        try:
            _collect(stream, norm, kind)
            seen.update(stream.norms)
            if not untie and (name := _tied(stream)) is not None:
                raise NotLinearError(norm, f"reads what {name} writes, which other operations read, too")
            rewrite(stream)
        except NotLinearError as error:
            seen.update(stream.norms)
            result.refused.append((norm, str(error)))
            continue
        result.norms += len(stream.norms)
    return result


def _tied(stream: Stream) -> str | None:
    """The name of a writer's weight that something else reads, too."""
    weights = [found.weight.weight for found in stream.maps] + [term.source.weight for term in stream.terms]
    return next((op.weight_name for op in weights if len(dict.fromkeys(op.value.users)) > 1), None)


def _collect(stream: Stream, norm: LayerNormOp | RMSNormOp, kind: type[Operation]) -> None:
    """Adds everything that is connected with what a norm reads. Raises NotLinearError for what must not be there."""
    frontier = [norm.x]
    while frontier:
        value = frontier.pop()
        if value not in stream.values:
            stream.values[value] = None
            frontier += _sources(stream, value)
            frontier += _uses(stream, value, kind)


def _sources(stream: Stream, value: Value) -> list[Value]:
    """What a value of the stream is made of."""
    op = value.defining_op
    if op is None:
        assert isinstance(value, BlockArgument) and value.block.parent is not None
        owner = value.block.parent.parent
        assert owner is not None
        raise NotLinearError(owner, "takes the residual stream as an argument, so that no map could be centred")
    if isinstance(op, MLPOp | ExpertsOp):
        return [region.block.terminator.operands[0] for region in op.regions]
    found = linear_map(op)
    if found is not None:
        stream.maps.append(found)
        return []
    if not isinstance(op, AtenOp):
        raise NotLinearError(op, "writes to the residual stream, and is not linear")
    term = fixed_term(op, 0) if op.name in ("aten.embedding.default", "aten.expand.default") else None
    if term is not None:
        stream.terms.append(term)
        return []
    moving = list(_carried(op))
    if not moving:
        raise NotLinearError(op, "writes to the residual stream, and is neither linear nor a sum")
    for position, operand in enumerate(op.operands):
        if op.name in _SUMS and operand not in moving:
            term = fixed_term(op, position)
            if term is None:
                raise NotLinearError(op, "adds a number that is not one for each channel")
            stream.terms.append(term)
    return moving


def _carried(op: AtenOp) -> Iterator[Value]:
    """The operands whose mean over channels decides that of the result; none where that is not so."""
    channels = shape(op.results[0])[-1]
    if op.name in _MOVES:
        inner = op.operands[0]
        if axis_behind((op,), len(shape(inner)) - 1) == len(shape(op.results[0])) - 1:
            yield inner
    elif op.name in _SUMS:
        if op.operand_count == 2:
            yield from (value for value in op.operands if not is_fixed(value))
    elif op.name in _FACTORS:
        factors = op.operands[1:]
        if op.name == "aten.mul.Tensor" and op.operand_count == 2 and shape(op.operands[0])[-1:] != (channels,):
            yield op.operands[1]
        elif all(shape(factor)[-1:] in ((), (1,)) for factor in factors):
            yield op.operands[0]


def _uses(stream: Stream, value: Value, kind: type[Operation]) -> Iterator[Value]:
    """The values of the stream that a value goes into."""
    for user in dict.fromkeys(value.users):
        if isinstance(user, LayerNormOp | RMSNormOp) and isinstance(user, kind) and user.x is value:
            if user not in stream.norms:
                stream.norms.append(user)
        elif isinstance(user, YieldOp) and user.parent_op is not None:
            yield user.parent_op.results[0]
        elif isinstance(user, AtenOp) and any(value is other for other in _carried(user)):
            yield user.results[0]
        else:
            raise NotLinearError(user, "reads the residual stream, and is no norm that ignores its mean")


@dataclass
class _Readers:
    """What reads the results of norms: values that are moved about, and the linear maps at their end."""

    values: dict[Value, None] = field(default_factory=dict)
    maps: list[LinearMap] = field(default_factory=list)
    holders: set[Operation] = field(default_factory=set)

    def follow(self, value: Value) -> None:
        """Adds everything behind a value; raises NotLinearError for what is not linear."""
        self.values[value] = None
        for user in dict.fromkeys(value.users):
            if isinstance(user, AtenOp) and user.name in _MOVES and any(value is other for other in _carried(user)):
                self.follow(user.results[0])
                continue
            self.maps += readers_of(value, user)
            if isinstance(user, MLPOp | ExpertsOp):
                self.holders.add(user)
                self.values.update((region.block.arguments[0], None) for region in user.regions)


def _retype(value: Value) -> None:
    """One channel less, also where the operation says its sizes."""
    kind = tensor(value)
    channels = kind.shape[-1]
    op = value.defining_op
    if op is not None and linear_map(op) is not None:
        return  # its type changed with its weight
    assert isinstance(channels, int)
    value.type = TensorType((*kind.shape[:-1], channels - 1), kind.dtype)
    if isinstance(op, AtenOp) and op.name in _SIZES:
        name = _SIZES[op.name]
        op.attributes[name] = (*op.attributes[name][:-1], channels - 1)
