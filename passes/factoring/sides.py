"""The matrices of an expert by name, and the norm of what goes into each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from math import prod

import torch

from moec.calibration.sample import LayerSample
from moec.calibration.second_moments import hidden_second_moment, input_second_moment
from moec.experts import Dense, FeedForward, LowRank, Matrix, MoeLayer, PartlyLowRank, Projection
from moec.passes.factoring.whitening import Whitening, plain, whitening


class Side(Enum):
    """A matrix of a feed-forward expert."""

    GATE = "gate"
    UP = "up"
    DOWN = "down"


class Basis(Enum):
    """The norm of an error: of the weight itself, of what it computes, or of that times the gate."""

    PLAIN = "plain"
    WHITENED = "whitened"
    GATE_WHITENED = "gate-whitened"


def projection(expert: FeedForward, side: Side) -> Projection | None:
    """One projection; None for the gate of experts without one."""
    return {Side.GATE: expert.gate, Side.UP: expert.up, Side.DOWN: expert.down}[side]


def sides_of(expert: FeedForward) -> list[Side]:
    """The matrices of an expert that there are."""
    return [side for side in Side if projection(expert, side) is not None]


def has_dense_matrices(expert: FeedForward) -> bool:
    """Whether no matrix is factored, packed or banded."""
    found = (projection(expert, side) for side in Side)
    return all(item is None or isinstance(item.matrix, Dense) for item in found)


def dense_matrix(expert: FeedForward, side: Side) -> torch.Tensor:
    """A matrix [out, in] multiplied out; the side must be there."""
    found = projection(expert, side)
    assert found is not None
    return found.dense()


def with_matrices(expert: FeedForward, matrices: Mapping[Side, Matrix]) -> FeedForward:
    """The expert with other matrices; biases stay."""

    def changed(side: Side, old: Projection) -> Projection:
        return replace(old, matrix=matrices[side]) if side in matrices else old

    gate = None if expert.gate is None else changed(Side.GATE, expert.gate)
    return replace(expert, gate=gate, up=changed(Side.UP, expert.up), down=changed(Side.DOWN, expert.down))


def parameters(expert: FeedForward, *, shared: bool = False) -> int:
    """Numbers in the matrices of an expert; those that it shares with others only if `shared`. Biases do not count."""
    found = (projection(expert, side) for side in Side)
    return sum(_numbers(item.matrix, shared) for item in found if item is not None)


def _numbers(matrix: Matrix, shared: bool) -> int:
    if isinstance(matrix, Dense):
        return matrix.weight.numel()
    if isinstance(matrix, PartlyLowRank):
        return matrix.whole.numel() + _numbers(matrix.rest, shared)
    if not isinstance(matrix, LowRank):  # packed numbers are as many as they stand for
        return prod(matrix.shape)
    own = [(matrix.left, not matrix.left_is_shared), (matrix.right, not matrix.right_is_shared), (matrix.base, False)]
    return sum(tensor.numel() for tensor, is_own in own if tensor is not None and (is_own or shared))


@dataclass
class Norms:
    """The norms of a layer's matrices, from a sample of its rows (None for the plain basis)."""

    layer: MoeLayer
    sample: LayerSample | None
    basis: Basis
    damping: float
    starved: set[int] = field(default_factory=set)
    _inputs: dict[int, Whitening | None] = field(default_factory=dict)

    def of(self, number: int, expert: FeedForward, side: Side) -> Whitening:
        """That of one matrix; plain for an expert that no row of the sample chose, which is noted in `starved`.

        Raises UsageError where activations are not finite.
        """
        found = self.known(number, side)
        if found is None and self.sample is not None:
            self.starved.add(number)
        matrix = projection(expert, side)
        assert matrix is not None
        return found or plain(matrix.matrix.shape[1])

    def known(self, number: int, side: Side) -> Whitening | None:
        """That of one matrix; None in the plain basis and for an expert that no row of the sample chose."""
        if self.sample is None:
            return None
        gated = self.basis is Basis.GATE_WHITENED
        if side is Side.DOWN:
            return whitening(hidden_second_moment(self.layer, self.sample, number, gated), self.damping)
        if number not in self._inputs:
            self._inputs.clear()
            self._inputs[number] = whitening(input_second_moment(self.layer, self.sample, number, gated), self.damping)
        return self._inputs[number]
