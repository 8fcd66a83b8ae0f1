"""External data: weights go to `model.onnx.data` piece by piece, so memory is bounded by one piece."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moec.cache import remember_link
from moec.errors import MoecError, ResourceError
from moec.ir.types import DType

if TYPE_CHECKING:
    import torch
    from typing_extensions import Buffer

PAGE = 4096
LARGE_PAGE = 65536  # granularity of memory maps on Windows
LARGE = 1 << 20
PAGED = 1 << 16  # below it, what is left of a page would be more than a sixteenth of the tensor
ALIGNMENT = 64  # what vector instructions read at once


@dataclass(frozen=True)
class FileRange:
    """Bytes of an existing file that already are a tensor's data."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A weight of the ONNX file.

    `pieces()` gives the row-major data of `shape` in element type `dtype`, as tensors one after another.
    `origin`, if known, is where the very same bytes lie in a checkpoint. `expert` names the expert whose weight it is,
    in the order of use; parts of one expert lie together.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    pieces: Callable[[], Iterable[torch.Tensor]]
    origin: FileRange | None = None
    expert: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.bytes


@dataclass(frozen=True)
class Placement:
    """Where a weight's data lies: file name relative to the model, offset and length in bytes."""

    location: str
    offset: int
    length: int


def lay_out(tensors: Sequence[StoredTensor], location: str) -> tuple[Placement, ...]:
    """Offsets of the tensors one after another, those of `PAGED` bytes or more on pages of their own.

    Runtimes map smaller ones, too, with what else is on their pages.
    """
    placements = []
    end = 0
    for tensor in tensors:
        alignment = LARGE_PAGE if tensor.nbytes >= LARGE else PAGE if tensor.nbytes >= PAGED else ALIGNMENT
        offset = -(-end // alignment) * alignment
        placements.append(Placement(location, offset, tensor.nbytes))
        end = offset + tensor.nbytes
    return tuple(placements)


def lay_out_experts(tensors: Sequence[StoredTensor], location: str, page: int) -> tuple[Placement, ...]:
    """Offsets of experts' weights, sorted by expert: an expert starts on a page, its weights follow one another."""
    placements = []
    end = 0
    before: tuple[int, ...] | None = None
    for tensor in tensors:
        alignment = ALIGNMENT if tensor.expert == before else page
        offset = -(-end // alignment) * alignment
        placements.append(Placement(location, offset, tensor.nbytes))
        end, before = offset + tensor.nbytes, tensor.expert
    return tuple(placements)


def write_tensors(path: Path, tensors: Sequence[StoredTensor], placements: Sequence[Placement]) -> str:
    """Writes the tensors at their places and returns the SHA-256 of the file; the gaps are zeros.

    Raises MoecError where a loaded piece does not have the promised type or size, ResourceError where the disk is full.
    """
    digest = hashlib.sha256()
    position = 0
    try:
        with path.open("wb") as file:
            for tensor, place in zip(tensors, placements, strict=True):
                gap = bytes(place.offset - position)
                file.write(gap)
                digest.update(gap)
                position = place.offset + place.length
                for piece in tensor.pieces():
                    data = _bytes(piece, tensor)
                    file.write(data)
                    digest.update(data)
                if file.tell() != position:
                    raise MoecError(
                        f"weight has {file.tell() - place.offset} bytes, expected {place.length}", where=tensor.name
                    )
    except OSError as error:
        raise ResourceError(
            f"cannot write the weights: {error.strerror or error}",
            where=str(path),
            hint="free some disk space, or write to another disk",
        ) from error
    return digest.hexdigest()


def hard_link(source: Path, folder: Path, name: str) -> None:
    """Makes `folder/name` the same file as `source`.

    ONNX Runtime refuses external data outside the model's folder, be it by `..`, an absolute path or a symbolic link.
    Raises ResourceError where the file system cannot link, for instance across disks.
    """
    try:
        os.link(source.resolve(), folder / name)
        remember_link(source.resolve())
    except OSError as error:
        raise ResourceError(
            f"cannot use the weights in place: {error.strerror or error}",
            where=str(source),
            hint="write the output to the checkpoint's own disk, or leave out --weights-in-place",
        ) from error


def _bytes(tensor: torch.Tensor, expected: StoredTensor) -> Buffer:
    import torch

    if str(tensor.dtype) != _TORCH_NAMES[expected.dtype]:
        raise MoecError(f"weight is {tensor.dtype}, expected {_TORCH_NAMES[expected.dtype]}", where=expected.name)
    flat = tensor.detach().contiguous().reshape(-1)
    data: Buffer = flat.view(torch.uint8).numpy().data
    return data


_TORCH_NAMES = {
    DType.F64: "torch.float64",
    DType.F32: "torch.float32",
    DType.F16: "torch.float16",
    DType.BF16: "torch.bfloat16",
    DType.F8E4M3FN: "torch.float8_e4m3fn",
    DType.F8E5M2: "torch.float8_e5m2",
    DType.I64: "torch.int64",
    DType.I32: "torch.int32",
    DType.I16: "torch.int16",
    DType.I8: "torch.int8",
    DType.U8: "torch.uint8",
    DType.I1: "torch.bool",
}
