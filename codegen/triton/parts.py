"""What slots of a layer name: experts as coded projections, cut by neurons where their matrices change in between.

A block of a feed-forward expert's neurons, with their rows of gate and up and their columns of down, is an expert of
its own, and the expert is the sum of such parts. So matrices in bands of unlike formats, or of which some neurons are
whole and the others of low rank, need no kernels but those of their parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from moec.codegen.triton.activation import LINEAR, ActivationSource, spell_activation
from moec.codegen.triton.formats import code_matrix
from moec.codegen.triton.packing import CodedExpert, CodedMatrix, CodedProjection, Factored
from moec.codegen.triton.widening import common_format
from moec.errors import UnsupportedModelError
from moec.experts import Affine, Constant, Dense, Expert, LowRank, Matrix, Projection
from moec.experts.expert import Banded, PartlyLowRank, Quantized


@dataclass(frozen=True)
class _Piece:
    """Coded rows or columns `start` to `stop` of a matrix."""

    start: int
    stop: int
    whole: CodedMatrix | None
    factors: Factored | None


def parts_of(expert: Expert, activations: list[ActivationSource], where: str) -> tuple[CodedExpert, ...]:
    """The parts of an expert, whose outputs add; none of one that gives nothing. New activations are appended.

    Raises UnsupportedModelError with the reason for what kernels cannot compute.
    """
    if isinstance(expert, Constant):
        return (CodedExpert(0, None, CodedProjection(), CodedProjection(bias=expert.value.float())),)
    if isinstance(expert, Affine):
        right = CodedProjection(code_matrix(Dense(expert.right), where))
        left = CodedProjection(code_matrix(Dense(expert.left), where), bias=expert.bias)
        return (CodedExpert(len(expert.right), None, right, left, _number(LINEAR, activations)),)
    number = _number(spell_activation(expert.activation, where), activations)
    gate = None if expert.gate is None else _pieces(expert.gate, 0, f"{where}, gate")
    up, down = _pieces(expert.up, 0, f"{where}, up"), _pieces(expert.down, 1, f"{where}, down")
    pieces = [*(gate or ()), *up, *down]
    borders = sorted({border for piece in pieces for border in (piece.start, piece.stop)})
    spans = list(pairwise(borders)) or [(0, 0)]
    parts = []
    for first, last in spans:
        found = [
            None if side is None or projection is None else _part(side, projection.bias, first, last, where)
            for side, projection in ((gate, expert.gate), (up, expert.up))
        ]
        joined = _joined(found[0], found[1])
        # the bias of the result is added once
        bias = expert.down.bias if first == spans[0][0] else None
        piece = _cut(_piece_with(down, first), 1, first, last, f"{where}, down")
        parts.append(
            CodedExpert(last - first, joined[0], joined[1], CodedProjection(piece.whole, piece.factors, bias), number)
        )
    return tuple(parts)


def _number(activation: ActivationSource, known: list[ActivationSource]) -> int:
    if activation not in known:
        known.append(activation)
    return known.index(activation)


def _part(pieces: tuple[_Piece, ...], bias: torch.Tensor | None, first: int, last: int, where: str) -> CodedProjection:
    piece = _cut(_piece_with(pieces, first), 0, first, last, where)
    return CodedProjection(piece.whole, piece.factors, None if bias is None else bias[first:last])


def _joined(gate: CodedProjection | None, up: CodedProjection | None) -> tuple[CodedProjection | None, CodedProjection]:
    """Gate and up, whose wholes kernels read in one format."""
    assert up is not None
    if gate is None or gate.whole is None or up.whole is None or gate.whole.format == up.whole.format:
        return gate, up
    one, other = common_format(gate.whole, up.whole)
    return replace(gate, whole=one), replace(up, whole=other)


def _pieces(projection: Projection, neurons: int, where: str) -> tuple[_Piece, ...]:
    """A matrix as pieces along the axis of the neurons: 0 for gate and up, 1 for down."""
    matrix = projection.matrix
    along = matrix.shape[neurons]
    if isinstance(matrix, Banded):
        return _stacked(matrix.parts, matrix.axis, neurons, where)
    if isinstance(matrix, PartlyLowRank):
        return _stacked((Dense(matrix.whole), matrix.rest), matrix.axis, neurons, where)
    whole, factors = _coded(matrix, where)
    return (_Piece(0, along, whole, factors),)


def _stacked(parts: tuple[Matrix, ...], axis: int, neurons: int, where: str) -> tuple[_Piece, ...]:
    if axis != neurons:
        raise UnsupportedModelError(
            "the Triton backend has no kernel for a matrix whose parts divide hidden states instead of neurons",
            where=where,
            hint="emit ONNX, or divide by neurons",
        )
    found, start = [], 0
    for part in parts:
        whole, factors = _coded(part, where)
        stop = start + part.shape[neurons]
        found.append(_Piece(start, stop, whole, factors))
        start = stop
    return tuple(found)


def _coded(matrix: Matrix, where: str) -> tuple[CodedMatrix | None, Factored | None]:
    if isinstance(matrix, Dense | Quantized):
        return code_matrix(matrix, where), None
    if isinstance(matrix, LowRank):
        factors = Factored(matrix.left, matrix.right, matrix.left_is_shared, matrix.right_is_shared)
        base = None if matrix.base is None else replace(code_matrix(Dense(matrix.base), where), shared=True)
        return base, factors
    raise UnsupportedModelError(
        f"the Triton backend has no kernel for matrices of experts that are {type(matrix).__name__.lower()}",
        where=where,
        hint="emit ONNX, or leave these experts as they were",
    )


def _piece_with(pieces: tuple[_Piece, ...], first: int) -> _Piece:
    return next((piece for piece in pieces if piece.start <= first < piece.stop), pieces[-1])


def _cut(piece: _Piece, axis: int, first: int, last: int, where: str) -> _Piece:
    """Some of a piece's rows or columns."""
    if (piece.start, piece.stop) == (first, last):
        return piece
    start, stop = first - piece.start, last - piece.start
    whole = None if piece.whole is None else _cut_matrix(piece.whole, axis, start, stop, where)
    factors = piece.factors
    if factors is not None:
        left, right = factors.left, factors.right
        factors = replace(
            factors,
            left=left if axis else left[start:stop],
            right=right[:, start:stop] if axis else right,
            left_is_shared=factors.left_is_shared and axis == 1,
            right_is_shared=factors.right_is_shared and axis == 0,
        )
    return _Piece(first, last, whole, factors)


def _cut_matrix(matrix: CodedMatrix, axis: int, start: int, stop: int, where: str) -> CodedMatrix:
    scales, zeros = matrix.scales, matrix.zeros
    group = matrix.format.scale_columns
    if axis == 0:
        scales, zeros = (None if item is None else item[start:stop] for item in (scales, zeros))
        return replace(matrix, values=matrix.values[start:stop], scales=scales, zeros=zeros)
    if group:
        if start % group:
            raise UnsupportedModelError(
                f"other matrices of the expert change at its neuron {start}, within the {group} weights of a scale",
                where=where,
                hint="divide neurons where groups of weights begin",
            )
        groups = slice(start // group, -(-stop // group))
        scales, zeros = (None if item is None else item[:, groups] for item in (scales, zeros))
    return replace(matrix, values=matrix.values[:, start:stop], scales=scales, zeros=zeros)
