"""Runs the operations of a block in order, frees each value after its last use, and checks every result's type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moec.dialects.builtin import WeightOp
from moec.errors import MoecError, VerificationError
from moec.ir import Block, Operation, TensorType, Value
from moec.reference.frame import Frame, Observation
from moec.reference.kernels import Kernel, prepare


@dataclass(frozen=True, slots=True)
class Step:
    """One operation, how to compute it, and the values that nobody reads afterwards."""

    op: Operation
    kernel: Kernel
    releases: tuple[Value, ...]

    def run(self, frame: Frame) -> None:
        """Computes the operation in `frame`.

        Raises VerificationError where torch refuses it, or where a result is not of the type that the IR says.
        """
        op = self.op
        try:
            results = self.kernel(frame)
        except MoecError:
            raise
        except (RuntimeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise VerificationError(
                f"{op.name} failed: {type(error).__name__}: {error}", where=f"{op!r} at {op.location}"
            ) from error
        if len(results) != len(op.results):
            raise VerificationError(f"{op.name} gave {len(results)} results", where=f"{op!r} at {op.location}")
        for result, tensor in zip(op.results, results, strict=True):
            _check_type(op, result, tensor, frame)
            frame.values[result] = tensor
        settings = frame.settings
        if settings.observers:
            observation = Observation(op, tuple(results), frame, frame.expert)
            for observer in settings.observers:
                observer(observation)
        for value in self.releases:
            frame.values.pop(value, None)


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """The steps of a block. Weights are no steps: they are loaded where they are used."""

    block: Block
    steps: tuple[Step, ...]

    def run(self, frame: Frame) -> list[torch.Tensor]:
        """Computes the block in `frame`, which holds its arguments; the operands of its terminator."""
        for step in self.steps:
            step.run(frame)
        return [frame.tensor(value) for value in self.block.terminator.operands]


def plan_block(block: Block) -> BlockPlan:
    """Prepares all operations of a block; raises UnsupportedModelError for one that has no kernel."""
    ops = [op for op in block if not isinstance(op, WeightOp) and op is not block.last]
    kept = set(block.terminator.operands)
    dead_after: dict[Operation, list[Value]] = {}
    seen: set[Value] = set()
    for op in reversed(ops):
        touched = dict.fromkeys([*(value for inner in op.walk() for value in inner.operands), *op.results])
        dead = [value for value in touched if value not in seen and value not in kept]
        dead_after[op] = dead
        seen.update(dead)
    return BlockPlan(block, tuple(Step(op, prepare(op), tuple(dead_after[op])) for op in ops))


def _check_type(op: Operation, value: Value, tensor: torch.Tensor, frame: Frame) -> None:
    kind = value.type
    assert isinstance(kind, TensorType)
    shape: Sequence[int] = tuple([frame.size(size) for size in kind.shape])
    if tuple(tensor.shape) != shape or tensor.dtype != frame.settings.types[kind.dtype]:
        raise VerificationError(
            f"{op.name} gave {tensor.dtype} {list(tensor.shape)}, the IR says {kind} = {list(shape)}",
            where=f"{op!r} at {op.location}",
        )
