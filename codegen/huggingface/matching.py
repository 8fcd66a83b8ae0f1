"""Compares two modules from their results backwards: equal operations in any order, weights paired by their places."""

from __future__ import annotations

from dataclasses import dataclass, field

from moec.codegen.huggingface.routing import routing_difference
from moec.dialects.builtin import WeightOp
from moec.dialects.moe import ExpertsOp, RouteOp
from moec.ir import Block, BlockArgument, Operation, OpResult, TensorType, Value
from moec.ir.equality import regions_equal
from moec.module import Module


@dataclass(frozen=True)
class Difference:
    """Something that the template cannot say: `place` is its location in our IR."""

    position: int
    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}" if self.place else self.text


@dataclass
class Match:
    """What was paired: `weights` by the template's expression of each, `experts` the template's layers with ours,
    `routes` their routers."""

    weights: dict[str, tuple[WeightOp, WeightOp]] = field(default_factory=dict)
    experts: dict[ExpertsOp, ExpertsOp] = field(default_factory=dict)
    routes: list[tuple[RouteOp, RouteOp]] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def first_difference(self) -> Difference | None:
        """The one that comes first in the model; None where the two are equal."""
        return min(self.differences, key=lambda difference: difference.position, default=None)


def match_modules(template: Module, module: Module) -> Match:
    """Pairs the operations that the first results (logits or hidden states) depend on.

    The weights of `moe.experts` are not paired here: one layer can be written with other bodies.
    """
    matcher = _Matcher(template, module)
    matcher.run()
    return matcher.match


class _Matcher:
    def __init__(self, template: Module, module: Module) -> None:
        self.match = Match()
        self._template, self._module = template, module
        self._positions = {op: number for number, op in enumerate(template.op.walk())}
        self._seen: set[tuple[Value, Value]] = set()

    def run(self) -> None:
        frontier = [(self._template.main.return_op.operands[0], self._module.main.return_op.operands[0])]
        while frontier:
            pair = frontier.pop()
            if pair in self._seen:
                continue
            self._seen.add(pair)
            frontier += self._pair(*pair)

    def _pair(self, expected: Value, found: Value) -> list[tuple[Value, Value]]:
        if isinstance(expected, BlockArgument) and isinstance(found, BlockArgument):
            mine = self._module.main.arg_names[found.index]
            other = self._template.main.arg_names[expected.index]
            if mine != other:
                self._differs(expected, found, f"it reads the input {mine} instead of {other}")
            return []
        if not isinstance(expected, OpResult) or not isinstance(found, OpResult) or expected.index != found.index:
            self._differs(expected, found, f"there is {_shown(found)} instead of {_shown(expected)}")
            return []
        one, two = expected.owner, found.owner
        if one.name != two.name:
            self._differs(expected, found, f"there is {two.name} instead of {one.name}")
            return []
        if isinstance(one, WeightOp) and isinstance(two, WeightOp):
            self._weights(one, two)
            return []
        if isinstance(one, ExpertsOp) and isinstance(two, ExpertsOp):
            self.match.experts[one] = two
            return [(one.x, two.x), (one.ids, two.ids), (one.gates, two.gates)]
        if isinstance(one, RouteOp) and isinstance(two, RouteOp):
            different = routing_difference(one, two)
            if (one, two) not in self.match.routes:
                self.match.routes.append((one, two))
        else:
            different = _different_attributes(one, two)
        if different:
            self._differs(expected, found, f"{two.name} has {different}")
        elif one.regions and not _bodies_equal(one, two):
            self._differs(expected, found, f"{two.name} computes something else")
        if len(one.operands) != len(two.operands):
            self._differs(
                expected, found, f"{two.name} has {len(two.operands)} operands instead of {len(one.operands)}"
            )
            return []
        return list(zip(one.operands, two.operands, strict=True))

    def _weights(self, expected: WeightOp, found: WeightOp) -> None:
        if expected.value.type != found.value.type:
            text = f"{found.weight_name} is {found.value.type} instead of {expected.value.type}"
            self._differs(expected.value, found.value, text)
        known = self.match.weights.setdefault(expected.source, (expected, found))
        if known[1].source != found.source:
            text = f"{known[1].weight_name} and {found.weight_name} are two tensors instead of {expected.weight_name}"
            self._differs(expected.value, found.value, text)

    def _differs(self, expected: Value, found: Value, text: str) -> None:
        op = expected.defining_op
        place = next((op.location.name for op in (found.defining_op, op) if op is not None and op.location.name), "")
        position = self._positions.get(op, -1) if op is not None else -1
        self.match.differences.append(Difference(position, place, text))


def _bodies_equal(one: Operation, two: Operation) -> bool:
    """Whether regions compute the same from their arguments; independent operations may come in any order."""
    if regions_equal(one, two):
        return True
    if len(one.regions) != len(two.regions):
        return False
    pairs = zip(one.regions, two.regions, strict=True)
    return all(_same_body(left.block, right.block) for left, right in pairs)


def _same_body(one: Block, two: Block) -> bool:
    if [argument.type for argument in one.arguments] != [argument.type for argument in two.arguments]:
        return False
    same: dict[Value, Value] = dict(zip(one.arguments, two.arguments, strict=True))
    frontier = list(zip(one.terminator.operands, two.terminator.operands, strict=False))
    while frontier:
        left, right = frontier.pop()
        if left in same:
            if same[left] is not right:
                return False
            continue
        same[left] = right
        if not isinstance(left, OpResult) or not isinstance(right, OpResult) or left.index != right.index:
            return False
        a, b = left.owner, right.owner
        if a.name != b.name or a.regions or b.regions or left.type != right.type or _different_attributes(a, b):
            return False
        if len(a.operands) != len(b.operands):
            return False
        frontier += zip(a.operands, b.operands, strict=True)
    return len(one.terminator.operands) == len(two.terminator.operands)


def _different_attributes(expected: Operation, found: Operation) -> str:
    parts = []
    for name in sorted({*expected.attributes, *found.attributes}):
        one, two = expected.attributes.get(name), found.attributes.get(name)
        if type(one) is not type(two) or (one != two and not (one != one and two != two)):
            parts.append(f"{name} = {two} instead of {one}")
    return ", ".join(parts)


def _shown(value: Value) -> str:
    op = value.defining_op
    kind = str(value.type) if isinstance(value.type, TensorType) else "a value"
    return f"an input ({kind})" if op is None else f"a result of {op.name} ({kind})"
