"""Common subexpression elimination."""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from moec.ir.attributes import struct_fields
from moec.ir.equality import regions_equal
from moec.ir.operation import Block, Operation
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, register_pass

# Two calls of one of these give two samples.
_RANDOM = re.compile(
    r"aten\.(rand|normal|bernoulli|multinomial|poisson|binomial|uniform|exponential|rrelu|.*dropout|empty|new_empty)"
)


@register_pass("cse")
@dataclass(frozen=True)
class CommonSubexpressionElimination(Pass):
    """Replaces a pure operation by an earlier one of the same block that computes the same.

    1. Same name, operands, attributes, result types and, up to the names of values, regions: the later goes.
    2. Attributes are compared with their types: `1`, `1.0` and `true` differ, and so do `0.0` and `-0.0`.
    3. Operations that draw random numbers stay.
    4. A region sees no values from outside of it, so that the body of an expert stays self-contained.
    """

    claim: ClassVar[Claim] = Claim.EXACT
    merged = Statistic("operations replaced by an earlier one")

    def run(self, op: Operation, context: PassContext) -> None:
        for region in op.regions:
            context.count(self.merged, _merge(region.block))


def _merge(block: Block) -> int:
    merged = 0
    seen: dict[Hashable, list[Operation]] = {}
    for op in block:
        for region in op.regions:
            merged += _merge(region.block)
        if not op.pure or _RANDOM.match(op.name):
            continue
        candidates = seen.setdefault(_key(op), [])
        earlier = next((other for other in candidates if regions_equal(other, op)), None)
        if earlier is None:
            candidates.append(op)
        else:
            op.replace_with(earlier.results)
            merged += 1
    return merged


def _key(op: Operation) -> Hashable:
    """Everything that must agree but the regions."""
    attributes = tuple([(name, _typed(op.attributes[name])) for name in sorted(op.attributes)])
    return op.name, op.operands, tuple([result.type for result in op.results]), attributes


def _typed(value: Any) -> Hashable:
    """A form in which values of different type or bits differ."""
    kind = type(value)
    if kind is float:
        return kind, repr(value)
    if kind is tuple:
        return tuple([_typed(item) for item in value])
    if hasattr(kind, "__dataclass_fields__") and not isinstance(value, Enum):
        return kind, tuple([(name, _typed(item)) for name, item in struct_fields(value)])
    return kind, value
