"""The content-addressed store of computed tensors: equal work is done once, and a torn or changed file is noticed.

    objects/ab/abcd....safetensors   one tensor, named by the digest of shape, element type and bytes
    work/ab/abcd....json             what a piece of work produced: result name -> digest, named by the work's key

Every file is written beside its place, flushed to the disk and renamed, so a reader never sees half of one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from moec.errors import MoecError, ResourceError, UsageError, VerificationError
from moec.weights.checkpoint import row_regions
from moec.weights.expression import Stored
from moec.weights.json_file import read_json_object
from moec.weights.safetensors_file import (
    MappedFiles,
    Region,
    SafetensorsHeader,
    TensorLocation,
    file_identity,
    read_header,
)
from moec.weights.tensor_spec import DTYPE_TO_SAFETENSORS, TensorSpec, begin_content_digest, tensor_bytes

_TENSOR = "tensor"
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Work:
    """A piece of work by everything that decides its result. `key` names it in the store."""

    inputs: tuple[str, ...]
    pass_name: str
    options: str
    code_version: str
    seed: int

    @property
    def key(self) -> str:
        """Hexadecimal SHA-256 over all fields."""
        fields = ["moec work 1", list(self.inputs), self.pass_name, self.options, self.code_version, self.seed]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


class WeightStore:
    """Computed tensors in a folder, by the digest of their content."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files = MappedFiles()
        self._verified: dict[str, SafetensorsHeader] = {}

    def put(self, tensor: torch.Tensor) -> Stored:
        """Store a tensor and return the reference to it. Raises ResourceError when the disk is full."""
        return self.put_parts(TensorSpec(tuple(tensor.shape), tensor.dtype), [tensor])

    def put_parts(self, spec: TensorSpec, parts: Iterable[torch.Tensor]) -> Stored:
        """Store a tensor that comes in parts along dimension 0, without ever holding all of it.

        Raises UsageError when the parts are not what `spec` says, ResourceError when the disk is full.
        """
        digest = begin_content_digest(spec)
        written = 0

        def write(stream: BinaryIO) -> None:
            nonlocal written
            stream.write(_header(spec))
            for part in parts:
                if part.dtype != spec.dtype:
                    raise UsageError(f"a part has type {part.dtype}, not {spec.dtype}", where=f"tensor {spec}")
                data = tensor_bytes(part)
                written += len(data)
                digest.update(data)
                stream.write(data)
            if written != spec.nbytes:
                raise UsageError(f"the parts have {written} bytes, not {spec.nbytes}", where=f"tensor {spec}")

        with self._new_file(write) as temporary:
            result = Stored(digest.hexdigest())
            self._place(temporary, self._object_path(result))
        self._verified.pop(result.digest, None)
        return result

    def __contains__(self, stored: object) -> bool:
        return isinstance(stored, Stored) and self._object_path(stored).is_file()

    def location(self, stored: Stored) -> TensorLocation:
        """Where the bytes of a stored tensor lie, after its content was compared with its digest (once per file state).

        Raises UsageError when it is not in the store, VerificationError when the file is not what was written.
        """
        return self._verify(stored).tensors[_TENSOR]

    def read(self, stored: Stored, region: Region | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """The part `region` (default: all) of a stored tensor, in `out` or a new tensor. Raises as `location` does."""
        header = self._verify(stored)
        location = header.tensors[_TENSOR]
        if region is None:
            region = tuple(range(size) for size in location.spec.shape)
        return self._files.read(location, region, header.identity, out)

    def remember(self, work: Work, results: Mapping[str, Stored]) -> None:
        """Write down what `work` produced. Raises ResourceError when the disk is full."""
        text = json.dumps({name: results[name].digest for name in sorted(results)}, indent=1)
        with self._new_file(lambda stream: stream.write(text.encode())) as temporary:
            self._place(temporary, self._work_path(work))

    def recall(self, work: Work) -> dict[str, Stored] | None:
        """What `work` produced before, or None when that is unknown or not all of it is there any more.

        Raises VerificationError when the note of it was tampered with.
        """
        path = self._work_path(work)
        if not path.is_file():
            return None
        results = {}
        for name, digest in read_json_object(path).items():
            if not isinstance(digest, str) or len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
                raise VerificationError(
                    f"the result {name!r} is not a digest", where=str(path), hint="delete this file, it is made again"
                )
            results[name] = Stored(digest)
        return results if all(stored in self for stored in results.values()) else None

    def close(self) -> None:
        """Close the files. A later read opens them again."""
        self._files.close()

    def _object_path(self, stored: Stored) -> Path:
        return self.folder / "objects" / stored.digest[:2] / f"{stored.digest}.safetensors"

    def _work_path(self, work: Work) -> Path:
        return self.folder / "work" / work.key[:2] / f"{work.key}.json"

    def _verify(self, stored: Stored) -> SafetensorsHeader:
        known = self._verified.get(stored.digest)
        path = self._object_path(stored)
        # another process, or another store on this folder, may have written the same tensor again
        if known is not None and path.is_file() and file_identity(path.stat()) == known.identity:
            return known
        if not path.is_file():
            raise UsageError(
                f"the stored tensor {stored.digest} is not there",
                where=str(self.folder),
                hint="give the store that it was written to, or run the passes again",
            )
        try:
            header = read_header(path)
            digest = self._digest_of_file(header)
        except MoecError as error:
            raise self._tampered(path, error.message) from error
        if digest != stored.digest:
            raise self._tampered(path, "its content does not match its digest")
        self._verified[stored.digest] = header
        return header

    def _digest_of_file(self, header: SafetensorsHeader) -> str:
        if set(header.tensors) != {_TENSOR}:
            return ""
        location = header.tensors[_TENSOR]
        digest = begin_content_digest(location.spec)
        for region in row_regions(location.spec, _CHUNK_BYTES):
            digest.update(tensor_bytes(self._files.read(location, region, header.identity)))
        return digest.hexdigest()

    @staticmethod
    def _tampered(path: Path, problem: str) -> VerificationError:
        return VerificationError(
            f"a stored tensor was changed after it was written: {problem}",
            where=str(path),
            hint="delete this file, it is computed again",
        )

    @contextmanager
    def _new_file(self, write: Callable[[BinaryIO], object]) -> Iterator[Path]:
        """A flushed temporary file that `write` filled; it is gone afterwards unless it was moved."""
        path: Path | None = None
        try:
            folder = self.folder / "temporary"
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=folder)
            path = Path(name)
            with os.fdopen(descriptor, "wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            yield path
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise ResourceError(
                    f"no space is left for a computed tensor: {error.strerror}",
                    where=str(self.folder),
                    hint="free some space or put the store on another disk; finished work is kept",
                ) from error
            raise UsageError(
                f"the store cannot be written: {error.strerror}", where=str(self.folder), hint="check its permissions"
            ) from error
        finally:
            if path is not None:
                path.unlink(missing_ok=True)

    @staticmethod
    def _place(temporary: Path, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _header(spec: TensorSpec) -> bytes:
    entry = {"dtype": DTYPE_TO_SAFETENSORS[spec.dtype], "shape": list(spec.shape), "data_offsets": [0, spec.nbytes]}
    text = json.dumps({_TENSOR: entry}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
