"""One safetensors file: a header that is checked byte for byte, and reads that touch only the rows asked for.

Format: https://github.com/huggingface/safetensors#format. The checks go beyond those of the reference reader: names
reach file names, ONNX names and generated sources, so names that could do harm there are refused here.
"""

from __future__ import annotations

import mmap
import os
import threading
import unicodedata
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy
import torch

from moec.errors import UnsafeInputError, UnsupportedModelError
from moec.weights.json_file import MAXIMUM_JSON_BYTES, open_regular_file, parse_json_object
from moec.weights.tensor_spec import SAFETENSORS_TO_DTYPE, TensorSpec

Region = tuple[range, ...]
"""One range of indices per dimension, each with a positive step: the part of a tensor that somebody wants."""

_MAXIMUM_NAME_LENGTH = 4096
_MAXIMUM_DIMENSIONS = 64
_MAXIMUM_SIZE = 2**63 - 1
_OPEN_MAPPINGS = 16
_ADVISE_ABOVE_BYTES = 1 << 20
# numpy has no bfloat16 and no float8: bytes travel as unsigned integers of the same size.
_CARRIERS = {
    1: (numpy.uint8, torch.uint8),
    2: (numpy.uint16, torch.uint16),
    4: (numpy.uint32, torch.uint32),
    8: (numpy.uint64, torch.uint64),
}
_GIT_LFS_START = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """Where the dense little-endian bytes of one tensor lie: a file, the offset in it and the length, in bytes."""

    path: Path
    offset: int
    nbytes: int
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """The checked header of one file, and the file's identity when it was read."""

    path: Path
    tensors: dict[str, TensorLocation]
    metadata: dict[str, str]
    identity: tuple[int, ...]


def read_header(path: Path, *, shown_as: Path | None = None) -> SafetensorsHeader:
    """Read and check the header of the safetensors file at `path`; errors name it as `shown_as`.

    Raises UnsafeInputError for everything malformed, UnsupportedModelError for element types that moec cannot read.
    """
    where = str(shown_as or path)
    descriptor = open_regular_file(path)
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        start = stream.read(8)
        if len(start) < 8:
            _refuse(f"the file has {status.st_size} bytes, too few for a safetensors file", where)
        if (start + stream.read(24)).startswith(_GIT_LFS_START):
            raise UnsafeInputError(
                "this is a Git LFS pointer, not the weights themselves", where=where, hint="run `git lfs pull` there"
            )
        header_length = int.from_bytes(start, "little")
        if header_length > MAXIMUM_JSON_BYTES:
            _refuse(f"the header claims {header_length} bytes, more than the {MAXIMUM_JSON_BYTES} allowed", where)
        if 8 + header_length > status.st_size:
            _refuse(f"the header claims {header_length} bytes, but the file has only {status.st_size}", where)
        stream.seek(8)
        data = stream.read(header_length)
    if not data.startswith(b"{"):
        _refuse("the header does not start with '{'", where)
    header = parse_json_object(data, where)
    metadata = _check_metadata(header.pop("__metadata__", {}), where)
    data_start = 8 + header_length
    tensors = {name: _check_entry(name, entry, path, data_start, where) for name, entry in header.items()}
    _check_tiling(tensors, data_start, status.st_size, where)
    _check_look_alikes(tensors, where)
    return SafetensorsHeader(path, tensors, metadata, file_identity(status))


def file_identity(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced or written to: device, inode, size and modification time."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def check_tensor_name(name: str, where: str) -> None:
    """Raise UnsafeInputError unless `name` can be shown, stored and written into file names and sources safely."""
    problem = ""
    if not name:
        problem = "is empty"
    elif len(name) > _MAXIMUM_NAME_LENGTH:
        problem = f"has {len(name)} characters, more than {_MAXIMUM_NAME_LENGTH}"
    elif any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
        problem = "has control characters in it"
    elif name.startswith("/") or "\\" in name or ".." in name.split("/"):
        problem = "looks like a path that leaves its folder"
    if problem:
        shown = name if len(name) <= 80 else f"{name[:80]}..."
        _refuse(f"the tensor name {shown!r} {problem}", where)


def _refuse(problem: str, where: str) -> NoReturn:
    raise UnsafeInputError(problem, where=where, hint="download the file again, it is damaged or was made to do harm")


def _check_metadata(metadata: object, where: str) -> dict[str, str]:
    if not isinstance(metadata, dict):
        _refuse("`__metadata__` in the header must be an object", where)
    checked: dict[str, str] = {}
    for key, value in metadata.items():
        if not isinstance(value, str):
            _refuse(f"`__metadata__` may hold only text, but {key!r} is {type(value).__name__}", where)
        checked[str(key)] = value
    return checked


def _check_entry(name: str, entry: object, path: Path, data_start: int, where: str) -> TensorLocation:
    check_tensor_name(name, where)
    where = f"{where}, tensor {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse("the header entry must have exactly dtype, shape and data_offsets", where)
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        _refuse("the shape must be a list of non-negative integers", where)
    if len(shape) > _MAXIMUM_DIMENSIONS:
        _refuse(f"the shape has {len(shape)} dimensions, more than {_MAXIMUM_DIMENSIONS}", where)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        _refuse("data_offsets must be two non-negative integers", where)
    if not isinstance(dtype_name, str):
        _refuse("the dtype must be text", where)
    if dtype_name not in SAFETENSORS_TO_DTYPE:
        raise UnsupportedModelError(
            f"the element type {dtype_name[:40]!r} is not one that moec reads",
            where=where,
            hint=f"convert the checkpoint to one of {', '.join(SAFETENSORS_TO_DTYPE)}",
        )
    spec = TensorSpec(tuple(shape), SAFETENSORS_TO_DTYPE[dtype_name])
    begin, end = offsets
    if end < begin:
        _refuse(f"the data_offsets {begin}, {end} are reversed", where)
    if spec.nbytes > _MAXIMUM_SIZE:
        _refuse(f"the shape {shape} needs more bytes than any file has", where)
    if end - begin != spec.nbytes:
        _refuse(f"the data_offsets give {end - begin} bytes, but {dtype_name} {shape} needs {spec.nbytes}", where)
    return TensorLocation(path, data_start + begin, spec.nbytes, spec)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAXIMUM_SIZE


def _check_tiling(tensors: dict[str, TensorLocation], data_start: int, file_size: int, where: str) -> None:
    """The tensors must cover the data exactly: no gap, no overlap, nothing behind the last one, nothing missing."""
    position, before = data_start, "the header"
    for name, location in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if location.offset > position:
            _refuse(f"{location.offset - position} bytes lie unused between {before} and tensor {name}", where)
        if location.offset < position:
            _refuse(f"tensor {name} overlaps {before}", where)
        position, before = location.offset + location.nbytes, f"tensor {name}"
    if position > file_size:
        _refuse(f"the file is cut: it has {file_size} bytes, but {before} ends at byte {position}", where)
    if position < file_size:
        _refuse(f"{file_size - position} bytes follow the last tensor", where)


def _check_look_alikes(tensors: dict[str, TensorLocation], where: str) -> None:
    """Names that differ in their bytes but not on the screen could smuggle one tensor in for another."""
    normal_forms: dict[str, str] = {}
    for name in tensors:
        other = normal_forms.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            _refuse(f"two tensor names look the same on a screen but differ: {other!a} and {name!a}", where)


class MappedFiles:
    """Reads regions of tensors through read-only memory maps, of which only the latest few stay open."""

    def __init__(self) -> None:
        self._mappings: OrderedDict[Path, tuple[mmap.mmap, tuple[int, ...]]] = OrderedDict()
        self._lock = threading.Lock()

    def read(
        self, location: TensorLocation, region: Region, identity: tuple[int, ...], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The part `region` of the tensor at `location`, copied into `out` or into a new dense tensor.

        Only the pages under that part are read, and they are given back afterwards. `identity` is the file's when its
        header was checked; `out`, of the tensor's type, may have any strides. Raises UnsafeInputError when the file has
        changed since.
        """
        spec = location.spec
        if out is None:
            out = torch.empty([len(part) for part in region], dtype=spec.dtype)
        if out.numel() == 0:
            return out
        with self._lock:
            mapping = self._mapping(location.path, identity)
        carrier = _CARRIERS[spec.dtype.itemsize]
        source = numpy.frombuffer(mapping, dtype=carrier[0], count=spec.elements, offset=location.offset)
        window = source.reshape(spec.shape)[tuple(slice(part.start, part.stop, part.step) for part in region)]
        pages = _pages(location, region)
        if pages is not None:
            mapping.madvise(mmap.MADV_WILLNEED, *pages)
        numpy.copyto(out.view(carrier[1]).numpy(), window)
        del source, window
        if pages is not None:
            mapping.madvise(mmap.MADV_DONTNEED, *pages)
        return out

    def close(self) -> None:
        """Give up every map. Tensors that were read stay valid, they are copies."""
        with self._lock:
            self._mappings.clear()

    def _mapping(self, path: Path, identity: tuple[int, ...]) -> mmap.mmap:
        found = self._mappings.get(path)
        if found is not None and found[1] == identity and file_identity(os.stat(path)) == identity:
            self._mappings.move_to_end(path)
            return found[0]
        descriptor = open_regular_file(path)
        try:
            if file_identity(os.fstat(descriptor)) != identity:
                raise UnsafeInputError(
                    "the file changed after its header was checked", where=str(path), hint="run the command again"
                )
            mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        self._mappings[path] = (mapping, identity)
        if len(self._mappings) > _OPEN_MAPPINGS:
            # not closed here: another thread may be copying from it; the last reference closes it
            self._mappings.popitem(last=False)
        return mapping


def _pages(location: TensorLocation, region: Region) -> tuple[int, int] | None:
    """Start and length of the pages under the rows of `region`, or None where advising the system is not worth it."""
    first, length = location.offset, location.nbytes
    if region:
        row = location.nbytes // location.spec.shape[0]
        first += region[0][0] * row
        length = (region[0][-1] + 1 - region[0][0]) * row
    if length < _ADVISE_ABOVE_BYTES or not hasattr(mmap, "MADV_WILLNEED"):
        return None
    start = first // mmap.PAGESIZE * mmap.PAGESIZE
    return start, first + length - start
