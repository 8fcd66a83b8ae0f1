"""The state of one block while it is interpreted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import torch

from moec.dialects.builtin import WeightOp
from moec.dialects.moe import RouteOp
from moec.ir import DimExpr, Operation, Value
from moec.reference.element_types import ElementTypes
from moec.reference.weight_loader import WeightLoader


class ExpertsLowering(Enum):
    """How `moe.experts` is computed; the two agree up to rounding.

    GROUPED computes each expert on the tokens that chose it. ORACLE computes every expert on every token.
    """

    GROUPED = "grouped"
    ORACLE = "oracle"


@dataclass(frozen=True)
class Observation:
    """One operation that was just computed.

    `expert` is the stored expert whose body the operation is in, None outside of experts.
    """

    op: Operation
    results: tuple[torch.Tensor, ...]
    frame: Frame
    expert: int | None

    def operand(self, value: Value) -> torch.Tensor:
        """The tensor of an operand of `op`."""
        return self.frame.tensor(value)


Observer = Callable[[Observation], None]


class Steering(Protocol):
    """Sends tokens to chosen experts, for measurements that must reach every expert."""

    def __call__(self, op: RouteOp, choice: torch.Tensor) -> torch.Tensor | None:
        """For each token of `op`, whose choice values are [T, E], the expert that it must get besides others.

        i64 [T], -1 for a token that chooses freely; None where all do. The expert's logit becomes the largest of its
        row, so that its gate counts; an expert that the mask of `op` excludes stays excluded.
        """


@dataclass
class RunSettings:
    """What all frames of one run share."""

    types: ElementTypes
    weights: WeightLoader
    experts: ExpertsLowering
    observers: tuple[Observer, ...] = ()
    steering: Steering | None = None


@dataclass
class Frame:
    """Values and sizes of one block. A body of experts has a frame of its own, whose `parent` is the function's."""

    settings: RunSettings
    symbols: dict[str, int]
    values: dict[Value, torch.Tensor]
    parent: Frame | None = None
    expert: int | None = None
    _sizes: dict[DimExpr, int] = field(default_factory=dict)

    def tensor(self, value: Value) -> torch.Tensor:
        """The tensor of a value; a weight is loaded now, and nobody else keeps it."""
        found = self.values.get(value)
        if found is not None:
            return found
        op = value.defining_op
        if isinstance(op, WeightOp):
            return self.settings.weights.load(op)
        if self.parent is not None:
            return self.parent.tensor(value)
        raise KeyError(f"{value!r} has no tensor yet")

    def optional(self, value: Value | None) -> torch.Tensor | None:
        """As `tensor`, and None for None."""
        return None if value is None else self.tensor(value)

    def row(self, value: Value, index: int) -> torch.Tensor:
        """`tensor(value)[index]`, of which a weight loads no more than that."""
        if value not in self.values and isinstance(value.defining_op, WeightOp):
            return self.settings.weights.load(value.defining_op, index)
        return self.tensor(value)[index]

    def size(self, size: int | DimExpr) -> int:
        """The number that a size stands for in this run."""
        if isinstance(size, int):
            return size
        found = self._sizes.get(size)
        if found is None:
            found = self._sizes[size] = size.evaluate(self.symbols)
        return found

    def inner(self, arguments: Sequence[tuple[Value, torch.Tensor]], tokens: int, expert: int | None) -> Frame:
        """A frame for a body that computes `tokens` tokens."""
        return Frame(self.settings, {**self.symbols, "tokens": tokens}, dict(arguments), self, expert)
