"""`moec.json`, the manifest of an artifact: what it was made from, how, and the digest of every file in it.

Equal inputs give an equal manifest, byte by byte: nothing in it depends on the clock, the machine or a path.
What varies from run to run is in `measurements.json` (`measurements.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from moec.artifact.digest import sha256_of_file
from moec.artifact.folder import MANIFEST_NAME
from moec.artifact.ledger import LedgerEntry
from moec.artifact.measurements import MEASUREMENTS_NAME
from moec.artifact.report import REPORT_HTML, REPORT_JSON
from moec.errors import UnsafeInputError, UsageError, VerificationError
from moec.record import Record, read_record, write_record

SCHEMA: Literal["moec.artifact/1"] = "moec.artifact/1"
_OUTSIDE = frozenset({MANIFEST_NAME, MEASUREMENTS_NAME, REPORT_JSON, REPORT_HTML})
_HEX_DIGEST = r"^[0-9a-f]{64}$"


class FileRecord(Record):
    """One file of the artifact or of its source; `size` in bytes."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern=_HEX_DIGEST)


class SourceRecord(Record):
    """What the artifact was made from. `files` are relative to the source folder."""

    model_type: str
    architecture: str
    parameters: int = Field(ge=0)
    files: dict[str, FileRecord]


class BuildRecord(Record):
    """The options that decide the bytes of the artifact. `calibration` is the file that was named for it, if any.

    `session_options` are what ONNX Runtime is to be told when it loads the model, `prepacked_bytes` the disk that
    weights stored in the layout of its kernels take. `architectures` are those whose binaries of kernels are there.
    """

    pipeline: str
    emit: tuple[str, ...]
    target: str
    dtype: str
    optimize_for: str
    check: str
    seed: int
    weights_in_place: bool
    activations: str = "float32"
    session_options: dict[str, str] = {}
    prepacked_bytes: int = 0
    recipe: str = ""
    budget: str = ""
    calibration: FileRecord | None = None
    uniform: bool = False
    checkpoint_dtype: str = ""
    shard_bytes: int = 0
    architectures: tuple[str, ...] = ()


class VerificationRecord(Record):
    """The outcome of the verification at compile time; the measured differences are in measurements.json."""

    status: Literal["passed", "skipped"]
    tokens: int = Field(ge=0)
    tolerance: float = Field(ge=0)


class Manifest(Record):
    """The content of `moec.json`. `others` are the files of the models beside the source, in their order."""

    schema_name: Literal["moec.artifact/1"] = Field(default=SCHEMA, alias="schema")
    source: SourceRecord
    others: tuple[dict[str, FileRecord], ...] = ()
    build: BuildRecord
    versions: dict[str, str]
    ledger: tuple[LedgerEntry, ...]
    verification: VerificationRecord
    files: dict[str, FileRecord]


def describe_files(folder: Path) -> dict[str, FileRecord]:
    """Size and digest of every file below `folder` that the manifest vouches for, by path relative to it, in order."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: describe_file(folder / name) for name in paths if name not in _OUTSIDE}


def describe_file(path: Path) -> FileRecord:
    """Size and digest of one file."""
    return FileRecord(size=path.stat().st_size, sha256=sha256_of_file(path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `moec.json` into `folder`: two spaces of indentation, the fields in the order of their declaration."""
    write_record(folder / MANIFEST_NAME, manifest)


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks `moec.json` of an artifact.

    Raises UsageError if `folder` is not an artifact, UnsafeInputError if its manifest is malformed.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise UsageError(
            f"this folder has no {MANIFEST_NAME}, so it is not an artifact of moec",
            where=str(folder),
            hint="give the folder that `moec compile -o` wrote",
        )
    manifest = read_record(path, Manifest)
    for name in manifest.files:
        if name.startswith("/") or "\\" in name or ".." in name.split("/") or name in ("", "."):
            raise UnsafeInputError("the manifest names a file outside of its folder", where=f"{path}, file {name!r}")
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compares every file of the artifact with its digest in the manifest.

    Raises VerificationError that names the first file that is missing, of another size, changed or not listed.
    """
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise VerificationError("a file of the artifact is missing", where=str(path), hint="compile again")
        size = path.stat().st_size
        if size != expected.size:
            raise VerificationError(
                f"a file of the artifact has {size} bytes instead of {expected.size}",
                where=str(path),
                hint="compile again, or copy the artifact again",
            )
        if sha256_of_file(path) != expected.sha256:
            raise VerificationError(
                "a file of the artifact is not the one that was compiled: its SHA-256 differs from the manifest",
                where=str(path),
                hint="compile again, or copy the artifact again",
            )
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    unknown = sorted(present - set(manifest.files) - _OUTSIDE)
    if unknown:
        raise VerificationError(
            "the artifact contains a file that its manifest does not list", where=str(folder / unknown[0])
        )
