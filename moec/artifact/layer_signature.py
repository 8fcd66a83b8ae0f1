"""What a segment of operations is, apart from names: to tell which layers a pass changed, and which change is the same.

A signature is a nested tuple. Two segments with equal concrete signatures compute the same function of the same weights
and inputs; two changes with equal abstract signatures differ only in which tensors their weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from moec.dialects.builtin import FuncOp, WeightOp
from moec.ir import Operation, Value
from moec.reference.layers import Segment

Signature = tuple[object, ...]
# what an attribute of this name says changes no result
_NOT_COMPUTED = frozenset({"protected"})
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
            _signature(first, old_values.__getitem__, _by_source),
            _signature(second, new_values.__getitem__, _by_source),
        )
        numbers = _Numbers(_own_arguments(after, second))
        abstract = (
            _signature(first, partial(numbers.outer, old_values), numbers.weight),
            _signature(second, partial(numbers.known_outer, new_values), numbers.known_weight),
        )
        unchanged = concrete[0] == concrete[1]
        result.append(SegmentChange(unchanged, None if numbers.novel else abstract))
        _name_outputs((old_values, first), (new_values, second), position, unchanged)
    return result


@dataclass(frozen=True)
class _Outer:
    """A value from outside a segment: an argument, or an output of the segment at `position`."""

    name: object
    position: int = -1


def _argument_tokens(function: FuncOp) -> dict[Value, _Outer]:
    names = function.arg_names or tuple(range(len(function.arguments)))
    return {argument: _Outer(name) for name, argument in zip(names, function.arguments, strict=True)}


def _own_arguments(function: FuncOp, segment: Segment) -> dict[Value, int]:
    inside = {inner for step in segment.steps for inner in step.op.walk()}
    own = [value for value in function.arguments if value.uses and inside.issuperset(value.users)]
    return {value: number for number, value in enumerate(own)}


def _name_outputs(
    old: tuple[dict[Value, _Outer], Segment], new: tuple[dict[Value, _Outer], Segment], position: int, unchanged: bool
) -> None:
    """Outputs of a changed segment correspond where both sides have one of their type; the others stay apart."""
    kinds = [[value.type for value in segment.outputs] for _, segment in (old, new)]
    for side, (tokens, segment) in enumerate((old, new)):
        for index, value in enumerate(segment.outputs):
            name: object = ("unclear", side, index)
            if unchanged:
                name = index
            elif all(found.count(value.type) == 1 for found in kinds):
                name = value.type
            tokens[value] = _Outer(name, position)


def _by_source(op: WeightOp) -> object:
    return op.source


@dataclass
class _Numbers:
    """Weights and outer values by their order in the old version. What only the new version has keeps its name.

    `own`: arguments of the new version that no other segment reads, such as the cache of one layer; they go by number,
    too. `novel`: weights of the new version alone.
    """

    own: dict[Value, int]
    sources: dict[str, int] = field(default_factory=dict)
    outers: dict[_Outer, int] = field(default_factory=dict)
    novel: list[str] = field(default_factory=list)

    def weight(self, op: WeightOp) -> object:
        return self.sources.setdefault(op.source, len(self.sources))

    def known_weight(self, op: WeightOp) -> object:
        if op.source not in self.sources:
            self.novel.append(op.source)
        return self.sources.get(op.source, op.source)

    def outer(self, tokens: dict[Value, _Outer], value: Value) -> object:
        return self.outers.setdefault(tokens[value], len(self.outers))

    def known_outer(self, tokens: dict[Value, _Outer], value: Value) -> object:
        token = tokens[value]
        if token not in self.outers and value in self.own:
            return ("own", self.own[value])
        return self.outers.get(token, token)


def _signature(segment: Segment, outer: Callable[[Value], object], weight: WeightToken) -> Signature:
    local: dict[Value, int] = {}

    def operand(value: Value) -> object:
        if value in local:
            return local[value]
        if isinstance(value.defining_op, WeightOp):
            return ("weight", weight(value.defining_op), value.type)
        return ("outer", outer(value), value.type)

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
        attributes = tuple(
            sorted((key, _typed(value)) for key, value in op.attributes.items() if key not in _NOT_COMPUTED)
        )
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
