"""What a segment of operations is, apart from names: to tell which layers a pass changed, and which change is the same.

A signature is a nested tuple. Two segments with equal concrete signatures compute the same function of the same weights
and inputs; two changes with equal abstract signatures differ only in which tensors their weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moec.dialects.builtin import FuncOp, WeightOp
from moec.ir import Operation, Value
from moec.reference.layers import Segment

Signature = tuple[object, ...]
WeightToken = Callable[[WeightOp], object]


@dataclass(frozen=True)
class SegmentChange:
    """One layer before and after a pass, as signatures; `abstract` is None where new weights came in."""

    unchanged: bool
    abstract: Signature | None


def compare_segments(
    before: FuncOp, old: Sequence[Segment], after: FuncOp, new: Sequence[Segment]
) -> list[SegmentChange]:
    """Compares functions segment by segment; both have the same number of segments, and the same source of weights."""
    old_values, new_values = _argument_tokens(before), _argument_tokens(after)
    result = []
    for position, (first, second) in enumerate(zip(old, new, strict=True)):
        concrete = (
            _signature(first, _located(old_values, None), _by_source),
            _signature(second, _located(new_values, None), _by_source),
        )
        sources: dict[str, int] = {}
        novel: list[str] = []
        abstract = (
            _signature(first, _located(old_values, position), lambda op: _numbered(op, sources)),
            _signature(second, _located(new_values, position), lambda op: _known(op, sources, novel)),
        )
        unchanged = concrete[0] == concrete[1]
        result.append(SegmentChange(unchanged, None if novel else abstract))
        _add_outputs(old_values, first, position, True, 0)
        _add_outputs(new_values, second, position, unchanged, 1)
    return result


@dataclass(frozen=True)
class _Token:
    """A value from outside a segment: an argument by name, or output `index` of the segment at `position`."""

    name: object
    position: int = -1
    index: int = 0


def _argument_tokens(function: FuncOp) -> dict[Value, _Token]:
    names = function.arg_names or tuple(range(len(function.arguments)))
    return {argument: _Token(name) for name, argument in zip(names, function.arguments, strict=True)}


def _add_outputs(tokens: dict[Value, _Token], segment: Segment, position: int, trusted: bool, side: int) -> None:
    """Outputs of one type keep their order only where the segment is unchanged; else nothing may rely on it."""
    kinds = [value.type for value in segment.outputs]
    for index, value in enumerate(segment.outputs):
        clear = trusted or kinds.count(value.type) == 1
        number = index if clear and trusted else kinds.index(value.type) if clear else index
        tokens[value] = _Token((value.type, "" if clear else ("unclear", side)), position, number)


def _located(tokens: Mapping[Value, _Token], here: int | None) -> Callable[[Value], object]:
    """How an outer value appears: with `here`, positions count back from there, so that layers can be compared."""

    def name(value: Value) -> object:
        token = tokens[value]
        previous = here is not None and token.position == here - 1
        return (token.name, "previous" if previous else token.position, token.index)

    return name


def _by_source(op: WeightOp) -> object:
    return op.source


def _numbered(op: WeightOp, sources: dict[str, int]) -> object:
    return sources.setdefault(op.source, len(sources))


def _known(op: WeightOp, sources: dict[str, int], novel: list[str]) -> object:
    if op.source not in sources:
        novel.append(op.source)
    return sources.get(op.source, op.source)


def _signature(segment: Segment, outer: Callable[[Value], object], weight: WeightToken) -> Signature:
    local: dict[Value, int] = {}

    def operand(value: Value) -> object:
        if value in local:
            return local[value]
        if isinstance(value.defining_op, WeightOp):
            return ("weight", weight(value.defining_op), value.type)
        return ("outer", outer(value))

    def describe(op: Operation) -> Signature:
        operands = tuple(operand(value) for value in op.operands)
        regions = []
        for region in op.regions:
            for argument in region.block.arguments:
                local[argument] = len(local)
            kinds = tuple(argument.type for argument in region.block.arguments)
            regions.append((kinds, tuple(describe(inner) for inner in region.block)))
        for result in op.results:
            local[result] = len(local)
        attributes = tuple(sorted((key, _typed(value)) for key, value in op.attributes.items()))
        kinds = tuple(result.type for result in op.results)
        return (op.name, operands, attributes, kinds, tuple(regions))

    described = tuple(describe(step.op) for step in segment.steps)
    return (described, tuple(local[value] for value in segment.outputs))


def _typed(value: object) -> object:
    """A hashable form in which 1, 1.0 and True differ."""
    if isinstance(value, tuple):
        return tuple(_typed(item) for item in value)
    return _Exactly(type(value).__name__, value)


@dataclass(frozen=True)
class _Exactly:
    kind: str
    value: object
