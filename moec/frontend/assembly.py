"""Tensors that a model fills piece by piece (`y = empty(...); y[..., :n] = a; y[..., n:] = b`) as concatenations."""

from __future__ import annotations

from dataclasses import dataclass

from moec.dialects import aten
from moec.errors import UnsupportedModelError
from moec.ir import Block, DimExpr, Location, TensorType, Value

Size = int | DimExpr


@dataclass(frozen=True)
class Piece:
    """Elements start..stop along the dimension; `value` is None where nothing was written yet."""

    start: Size
    stop: Size
    value: Value | None


@dataclass(frozen=True)
class Assembly:
    """A tensor of type `kind`, cut along `dim`."""

    kind: TensorType
    dim: int
    pieces: tuple[Piece, ...]

    @property
    def is_complete(self) -> bool:
        return all(piece.value is not None for piece in self.pieces)


def uninitialised(kind: TensorType) -> Assembly:
    """A tensor of which nothing is written."""
    return Assembly(kind, 0, (Piece(0, kind.shape[0], None),))


def overwrite(
    base: Assembly | Value, value: Value, dim: int, start: Size, stop: Size, block: Block, at: Location
) -> Assembly:
    """`base` with `value` in start..stop along `dim`. Parts of the base that remain are sliced in `block`."""
    kind = base.kind if isinstance(base, Assembly) else base.type
    assert isinstance(kind, TensorType)
    if not isinstance(base, Assembly):
        base = Assembly(kind, dim, (Piece(0, kind.shape[dim], base),))
    elif base.dim != dim:
        if any(piece.value is not None for piece in base.pieces):
            base = Assembly(kind, dim, (Piece(0, kind.shape[dim], materialise(base, block, at)),))
        else:
            base = Assembly(kind, dim, (Piece(0, kind.shape[dim], None),))
    pieces: list[Piece] = []
    for piece in base.pieces:
        if _before(piece.stop, start) or _before(stop, piece.start):
            pieces.append(piece)
            continue
        if not _before(start, piece.start):
            pieces.append(_part(piece, piece.start, start, kind, dim, block, at))
        if not _before(piece.stop, stop):
            pieces.append(_part(piece, stop, piece.stop, kind, dim, block, at))
    new = Piece(start, stop, value)
    position = next((index for index, piece in enumerate(pieces) if _before(stop, piece.start)), len(pieces))
    pieces.insert(position, new)
    return Assembly(kind, dim, tuple(pieces))


def part_of(
    assembly: Assembly, kind: TensorType, dim: int, start: Size, stop: Size, block: Block, at: Location
) -> Assembly | None:
    """Elements start..stop along `dim`, of type `kind`, without joining the pieces; None where they must be joined."""
    if all(piece.value is None for piece in assembly.pieces):
        return uninitialised(kind)
    if dim != assembly.dim:
        return None
    cut: list[Piece] = []
    for piece in assembly.pieces:
        if _before(piece.stop, start) or _before(stop, piece.start):
            continue
        first = piece.start if _before(start, piece.start) else start
        last = piece.stop if _before(piece.stop, stop) else stop
        whole = first == piece.start and last == piece.stop
        kept = piece if whole else _part(piece, first, last, assembly.kind, dim, block, at)
        cut.append(Piece(first - start, last - start, kept.value))
    return Assembly(kind, dim, tuple(cut))


def materialise(assembly: Assembly, block: Block, at: Location) -> Value:
    """The tensor as one value. Raises UnsupportedModelError if a part of it was never written."""
    values = [piece.value for piece in assembly.pieces if piece.value is not None]
    if len(values) != len(assembly.pieces):
        raise UnsupportedModelError("the model reads memory that it did not initialise")
    if len(values) == 1:
        return values[0]
    cat = aten.build("cat.default", {"tensors": tuple(values)}, (assembly.kind,), at, dim=assembly.dim)
    block.append(cat)
    return cat.result


def _before(left: Size, right: Size) -> bool:
    """left <= right, for sizes whose difference is known or has the same sign for all sizes."""
    difference = right - left
    if isinstance(difference, DimExpr):
        signs = {coefficient > 0 for _, coefficient in difference.terms}
        if len(signs) == 1:
            return signs == {True}
        raise UnsupportedModelError(f"a tensor is written up to {left}, which cannot be compared with {right}")
    return difference >= 0


def _part(piece: Piece, start: Size, stop: Size, kind: TensorType, dim: int, block: Block, at: Location) -> Piece:
    if piece.value is None:
        return Piece(start, stop, None)
    shape = (*kind.shape[:dim], stop - start, *kind.shape[dim + 1 :])
    offset = piece.start
    cut = aten.build(
        "slice.Tensor",
        {"self": piece.value},
        (TensorType(shape, kind.dtype),),
        at,
        dim=dim,
        start=start - offset,
        end=stop - offset,
    )
    block.append(cut)
    return Piece(start, stop, cut.result)
