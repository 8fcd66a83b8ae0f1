"""The numbers of the new model's parameters: each a producer that gives any part of it, nothing held in memory.

A parameter is either an expression over the tensors of our IR, or a stack of experts, of which each row is written
through the views by which the template's body reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from moec.errors import UnsupportedModelError
from moec.weights.context import WeightContext
from moec.weights.evaluation import Evaluator
from moec.weights.expression import (
    Cast,
    Expression,
    Fp8Block,
    Mxfp4,
    Permute,
    Reference,
    Reshape,
    Stored,
    Transpose,
)
from moec.weights.safetensors_file import Region
from moec.weights.tensor_spec import TensorSpec


class Producer(Protocol):
    """Where the numbers of one parameter come from."""

    def part(self, region: Region) -> torch.Tensor:
        """The part `region` of the parameter, a new tensor."""

    def origin(self) -> torch.dtype | None:
        """The element type that holds every number exactly, where it is known without looking at them."""


@dataclass(frozen=True)
class Taken:
    """A parameter that is a weight of ours, element by element."""

    expression: Expression
    weights: WeightContext

    def part(self, region: Region) -> torch.Tensor:
        """See `Producer`."""
        return Evaluator(self.weights).evaluate(self.expression, region)

    def origin(self) -> torch.dtype | None:
        """The one type of the tensors that it is made of; None if they differ or if something is computed."""
        types: set[torch.dtype | None] = set()
        frontier = [self.expression]
        while frontier:
            expression = frontier.pop()
            if isinstance(expression, Fp8Block | Mxfp4):
                types.add(None)
            elif isinstance(expression, Reference | Stored):
                types.add(self.weights.leaf_spec(expression).dtype)
            elif isinstance(expression, Cast) and expression.dtype.itemsize < 4:
                types.add(None)
            else:
                frontier += expression.operands
        return types.pop() if len(types) == 1 else None


@dataclass(frozen=True)
class Rows:
    """A parameter of which `row(index)` gives one entry along its first dimension, all others at most once in a row."""

    row: Callable[[int], torch.Tensor]
    shape: tuple[int, ...]

    def part(self, region: Region) -> torch.Tensor:
        """See `Producer`."""
        rest = tuple(slice(part.start, part.stop, part.step) for part in region[1:])
        if not region[0]:
            return torch.empty([len(part) for part in region])
        return torch.stack([self.row(index)[rest] for index in region[0]])

    def origin(self) -> torch.dtype | None:
        """See `Producer`."""
        return None


@dataclass(frozen=True)
class Rearranged:
    """A parameter of which the template reads a rearranged form; `inverse` gives it back from `_VALUE`, that form."""

    inverse: Expression
    value: Producer
    spec: TensorSpec

    @property
    def _weights(self) -> ParameterValues:
        return ParameterValues({_VALUE.name: self.spec}, {_VALUE.name: self.value})

    def part(self, region: Region) -> torch.Tensor:
        """See `Producer`."""
        return Evaluator(self._weights).evaluate(self.inverse, region)

    def origin(self) -> torch.dtype | None:
        """See `Producer`."""
        return self.value.origin()


_VALUE = Reference("value")


def rearranged(view: Expression, shape_of: Callable[[Expression], TensorSpec], value: Producer) -> tuple[str, Producer]:
    """The parameter under `view`, an expression over it alone, and its numbers where `view` of them is `value`.

    Raises UnsupportedModelError where the view leaves elements out or repeats them.
    """
    inverse: Expression = _VALUE
    spec, whole = shape_of(view), view
    while not isinstance(view, Reference):
        match view:
            case Transpose(_, first, second):
                inverse = Transpose(inverse, first, second)
            case Permute(_, dims):
                inverse = Permute(inverse, tuple(dims.index(dim) for dim in range(len(dims))))
            case Reshape(operand, _):
                inverse = Reshape(inverse, shape_of(operand).shape)
            case _:
                raise UnsupportedModelError(f"a parameter is read through {whole}, which cannot be turned back")
        (view,) = view.operands
    return view.name, value if inverse is _VALUE else Rearranged(inverse, value, spec)


class ParameterValues(WeightContext):
    """The tensors of the new model by the names of its parameters, as leaves of weight expressions."""

    def __init__(self, specs: Mapping[str, TensorSpec], producers: Mapping[str, Producer]) -> None:
        super().__init__()
        self._specs = specs
        self._producers = producers

    def leaf_spec(self, leaf: Reference | Stored) -> TensorSpec:
        """Shape and element type of a parameter."""
        return self._specs[_name(leaf)]

    def leaf_part(self, leaf: Reference | Stored, region: Region, out: torch.Tensor | None = None) -> torch.Tensor:
        """Part of a parameter, copied into `out` or a new tensor."""
        value = self._producers[_name(leaf)].part(region)
        return value if out is None else out.copy_(value)

    def origin(self, expression: Expression) -> torch.dtype | None:
        """The element type that holds every number of `expression` exactly, where it is known."""
        found = {self._producers[reference.name].origin() for reference in expression.references()}
        return found.pop() if len(found) == 1 else None


def _name(leaf: Reference | Stored) -> str:
    return leaf.name if isinstance(leaf, Reference) else leaf.digest
