"""A checkpoint folder as Hugging Face writes it: `model.safetensors`, or shards with an index. Never pickle."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from moec.cache import is_own_link
from moec.errors import UnsafeInputError, UsageError
from moec.weights.json_file import open_regular_file, read_json_object
from moec.weights.safetensors_file import (
    MappedFiles,
    Region,
    SafetensorsHeader,
    TensorLocation,
    check_tensor_name,
    read_header,
)
from moec.weights.tensor_spec import TensorSpec, begin_content_digest, tensor_bytes

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DIGEST_CHUNK_BYTES = 16 << 20


class Checkpoint:
    """The tensors of a checkpoint folder, read lazily: a part of a tensor touches only that part of the file."""

    def __init__(self, folder: Path, headers: tuple[SafetensorsHeader, ...]) -> None:
        self.folder = folder
        self._headers = headers
        self._locations: dict[str, TensorLocation] = {}
        self._identities = {header.path: header.identity for header in headers}
        for header in headers:
            self._locations.update(header.tensors)
        self._files = MappedFiles()
        self._digests: dict[str, str] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Open the weights in `folder` and check every header and the index; no tensor is read.

        Raises UsageError when there are no weights, UnsafeInputError when a file or the index is malformed, leaves
        the folder, or when there is nothing but pickle, UnsupportedModelError for unknown element types.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UsageError("there is no such folder", where=str(folder), hint="give a folder with a checkpoint")
        weight_map = _read_index(folder)
        if weight_map is None:
            path = folder / _find_single_file(folder)
            return cls(folder, (read_header(resolve_member(folder, path.name), shown_as=path),))
        headers = tuple(
            read_header(resolve_member(folder, shard), shown_as=folder / shard)
            for shard in sorted(set(weight_map.values()))
        )
        _compare_index(folder, weight_map, headers)
        return cls(folder, headers)

    def __contains__(self, name: object) -> bool:
        return name in self._locations

    def __iter__(self) -> Iterator[str]:
        return iter(self._locations)

    def __len__(self) -> int:
        return len(self._locations)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.folder)!r}: {len(self)} tensors, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(location.nbytes for location in self._locations.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, sorted by name, with links of the hub's cache resolved."""
        return tuple(header.path for header in self._headers)

    def location(self, name: str) -> TensorLocation:
        """File, offset and length of tensor `name`. Raises UsageError when there is none."""
        found = self._locations.get(name)
        if found is None:
            near = difflib.get_close_matches(name, self._locations, n=1)
            raise UsageError(
                f"the checkpoint has no tensor {name}",
                where=str(self.folder),
                hint=f"did you mean {near[0]}" if near else "list the tensors with `moec inspect`",
            )
        return found

    def spec(self, name: str) -> TensorSpec:
        """Shape and element type of tensor `name`. Raises UsageError when there is none."""
        return self.location(name).spec

    def read(self, name: str, region: Region | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """The part `region` (default: all) of tensor `name`, copied into `out` or a new tensor, in its type on disk.

        Raises UsageError when there is none, UnsafeInputError when the file has changed since it was opened.
        """
        location = self.location(name)
        if region is None:
            region = tuple(range(size) for size in location.spec.shape)
        return self._files.read(location, region, self._identities[location.path], out)

    def digest(self, name: str) -> str:
        """SHA-256 of shape, element type and bytes of tensor `name`, from the bytes themselves, streamed.

        It is computed once for each name; a file that changes meanwhile raises UnsafeInputError, as in `read`.
        """
        known = self._digests.get(name)
        if known is not None:
            return known
        spec = self.spec(name)
        digest = begin_content_digest(spec)
        for region in row_regions(spec, _DIGEST_CHUNK_BYTES):
            digest.update(tensor_bytes(self.read(name, region)))
        self._digests[name] = digest.hexdigest()
        return self._digests[name]

    def file_digests(self) -> dict[str, str]:
        """SHA-256 of each weight file as it is on disk, by file name, streamed."""
        result = {}
        for path in self.files:
            digest = hashlib.sha256()
            with os.fdopen(open_regular_file(path), "rb") as stream:
                while chunk := stream.read(_DIGEST_CHUNK_BYTES):
                    digest.update(chunk)
            result[path.name] = digest.hexdigest()
        return result

    def close(self) -> None:
        """Close the files. A later read opens them again."""
        self._files.close()


class JoinedCheckpoint(Checkpoint):
    """A checkpoint with others beside it, whose tensors go by `name_in_other`; all else is that of the first one."""

    def __init__(self, first: Checkpoint, others: Sequence[Checkpoint]) -> None:
        super().__init__(first.folder, first._headers)
        self._others = tuple(others)

    def __contains__(self, name: object) -> bool:
        home = self._home(name)
        return super().__contains__(name) if home is None else home[1] in home[0]

    def location(self, name: str) -> TensorLocation:
        """As `Checkpoint.location`, for tensors of the others too."""
        home = self._home(name)
        return super().location(name) if home is None else home[0].location(home[1])

    def read(self, name: str, region: Region | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """As `Checkpoint.read`, for tensors of the others too."""
        home = self._home(name)
        return super().read(name, region, out) if home is None else home[0].read(home[1], region, out)

    def close(self) -> None:
        """Close the files of all. A later read opens them again."""
        super().close()
        for other in self._others:
            other.close()

    def _home(self, name: object) -> tuple[Checkpoint, str] | None:
        """The other checkpoint that a name belongs to, and the tensor's name in it; None for the first one."""
        found = _OTHER_NAME.fullmatch(name) if isinstance(name, str) else None
        if found is None or not 1 <= int(found[1]) <= len(self._others):
            return None
        return self._others[int(found[1]) - 1], found[2]


def name_in_other(number: int, name: str) -> str:
    """The name of a tensor of the other checkpoint `number`, counted from 1, beside the first one's."""
    return f"with.{number}/{name}"


_OTHER_NAME = re.compile(r"with\.([1-9][0-9]{0,3})/(.+)", re.DOTALL)


def row_regions(spec: TensorSpec, limit: int) -> Iterator[Region]:
    """Cut a tensor along dimension 0 into parts of at most `limit` bytes, or of one row where a row is larger."""
    if not spec.shape:
        yield ()
        return
    rows = spec.shape[0]
    step = max(1, limit * rows // max(spec.nbytes, 1)) if rows else 1
    rest = tuple(range(size) for size in spec.shape[1:])
    for start in range(0, rows, step):
        yield range(start, min(start + step, rows)), *rest


def resolve_member(folder: Path, name: str) -> Path:
    """The regular file `name` directly in `folder`, links of the Hugging Face cache followed.

    The cache keeps `snapshots/REVISION/NAME` as a link to `blobs/DIGEST` two folders up; no other link may leave the
    folder. Hard links are refused as well, unless moec made them for weights in place: an unpacked archive can use
    one to reach any file of the same disk.

    Raises UsageError when there is no such file, UnsafeInputError when it is not a plain file of this folder.
    """
    path = folder / name
    try:
        status = path.lstat()
    except OSError as error:
        raise UsageError(
            f"the file cannot be read: {error.strerror}", where=str(path), hint="download the missing file"
        ) from None
    if stat.S_ISLNK(status.st_mode):
        target = path.resolve()
        allowed = [folder.resolve()]
        if folder.resolve().parent.name == "snapshots":
            allowed.append(folder.resolve().parent.parent / "blobs")
        if target.parent not in allowed:
            _refuse_path("the file is a link to a place outside its folder", path)
        if not target.exists():
            _refuse_path("the file is a link to nothing", path)
        path, status = target, target.lstat()
    if not stat.S_ISREG(status.st_mode):
        _refuse_path("this is not a regular file", folder / name)
    if status.st_nlink > 1 and not is_own_link(status):
        _refuse_path("the file is hard-linked to another name", folder / name)
    return path


def _refuse_path(problem: str, path: Path) -> NoReturn:
    raise UnsafeInputError(problem, where=str(path), hint="copy the file itself into the folder")


def _find_single_file(folder: Path) -> str:
    names = sorted(os.listdir(folder))
    if SINGLE_FILE in names:
        return SINGLE_FILE
    candidates = [name for name in names if name.endswith(".safetensors")]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise UsageError(
            f"there are {len(candidates)} safetensors files but neither {SINGLE_FILE} nor {INDEX_FILE}",
            where=str(folder),
            hint="download the index as well",
        )
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        raise UnsafeInputError(
            f"the weights are only there as pickle ({', '.join(pickles[:3])}), which can run any code",
            where=str(folder),
            hint="convert them to safetensors on a machine that may be lost, or download a safetensors revision",
        )
    raise UsageError("the folder holds no weights", where=str(folder), hint=f"it needs {SINGLE_FILE} or {INDEX_FILE}")


def _read_index(folder: Path) -> dict[str, str] | None:
    """The map from tensor to shard, names checked, or None when there is no index."""
    path = folder / INDEX_FILE
    if not os.path.lexists(path):
        return None
    index = read_json_object(path, follow_link_to=resolve_member(folder, INDEX_FILE))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnsafeInputError("the index has no `weight_map` object", where=str(path), hint="download the index again")
    checked: dict[str, str] = {}
    for name, shard in weight_map.items():
        check_tensor_name(name, str(path))
        if not isinstance(shard, str) or not _is_plain_name(shard) or not shard.endswith(".safetensors"):
            raise UnsafeInputError(
                f"the index puts tensor {name} into {str(shard)[:200]!r}, which is not a safetensors file name",
                where=str(path),
                hint="every shard must be a safetensors file directly in the folder",
            )
        checked[name] = shard
    if os.path.lexists(folder / SINGLE_FILE) and SINGLE_FILE not in checked.values():
        raise UnsafeInputError(
            f"there are both {SINGLE_FILE} and an index of other files",
            where=str(folder),
            hint="remove the one that is not meant",
        )
    for shard in sorted(set(checked.values())):
        if not os.path.lexists(folder / shard):
            raise UnsafeInputError(
                f"the shard {shard} that the index lists is missing",
                where=str(path),
                hint="download the missing shard",
            )
    return checked


def _is_plain_name(name: str) -> bool:
    return bool(name) and not any(character in name for character in "/\\\0\n:") and name not in (".", "..")


def _compare_index(folder: Path, weight_map: dict[str, str], headers: tuple[SafetensorsHeader, ...]) -> None:
    """Every tensor must be in exactly the shard where the index says it is, and no shard may hold more."""

    def disagree(problem: str, shard: str) -> NoReturn:
        raise UnsafeInputError(
            problem, where=str(folder / shard), hint="index and shards are of different revisions: download them again"
        )

    owners: dict[str, str] = {}
    for header, shard in zip(headers, sorted(set(weight_map.values())), strict=True):
        for name in header.tensors:
            if name in owners:
                disagree(f"tensor {name} is in two shards, {owners[name]} and {shard}", shard)
            owners[name] = shard
            if name not in weight_map:
                disagree(f"tensor {name} is in shard {shard} but not in the index", shard)
    for name, shard in weight_map.items():
        if name not in owners:
            disagree(f"tensor {name} is in the index but not in shard {shard}", shard)
        if owners[name] != shard:
            disagree(f"the index puts tensor {name} into {shard}, but it is in {owners[name]}", shard)
