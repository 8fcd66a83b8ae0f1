"""An artifact opened again: its manifest, its IR with weights from the source, and the source itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moec.artifact.manifest import Manifest, read_manifest
from moec.artifact.measurements import MEASUREMENTS_NAME, Measurements
from moec.artifact.options import Backend
from moec.dialects.builtin import ModuleOp
from moec.errors import UnsafeInputError, UsageError
from moec.ir import parse_module, verify
from moec.module import Module
from moec.record import read_record

MODULE_FILE = "module.mlir"
ONNX_FOLDER = "onnx"
MODEL_FILE = "model.onnx"
CHECKPOINT_FOLDER = "huggingface"
TRITON_FOLDER = "triton"


@dataclass(frozen=True)
class Artifact:
    """A folder that `moec compile` wrote."""

    folder: Path
    manifest: Manifest
    measurements: Measurements

    @staticmethod
    def open(folder: Path) -> Artifact:
        """Reads the descriptions in `folder`. Raises UsageError or UnsafeInputError."""
        manifest = read_manifest(folder)
        path = folder / MEASUREMENTS_NAME
        if not path.is_file():
            raise UsageError(f"the artifact has no {MEASUREMENTS_NAME}", where=str(folder))
        return Artifact(folder, manifest, read_record(path, Measurements))

    @property
    def onnx(self) -> Path:
        """The exported model."""
        return self.folder / ONNX_FOLDER / MODEL_FILE

    @property
    def checkpoint(self) -> Path:
        """The Hugging Face checkpoint, where the artifact has one."""
        return self.folder / CHECKPOINT_FOLDER

    @property
    def kernels(self) -> Path:
        """The folder of the package of kernels, where the artifact has one."""
        return self.folder / TRITON_FOLDER

    def has(self, backend: Backend) -> bool:
        """Whether the artifact was compiled for a backend."""
        return backend.value in self.manifest.build.emit

    @property
    def title(self) -> str:
        """The name of the source folder."""
        return Path(self.measurements.source).name

    def source_folder(self, given: Path | None = None) -> Path:
        """`given`, else the folder that the artifact was compiled from. Raises UsageError if it is not there."""
        source = given if given is not None else Path(self.measurements.source)
        if not source.is_dir():
            raise UsageError(
                "the source of the artifact is not there",
                where=str(source),
                hint="name it with --against SOURCE; `moec verify --files-only` checks the digests without it",
            )
        return source

    def other_folders(self, given: Sequence[Path] = ()) -> tuple[Path, ...]:
        """`given`, else the folders of the models beside the source. Raises UsageError for another number of them, and
        if one is not there."""
        recorded = tuple(Path(other) for other in self.measurements.others)
        if given and len(given) != len(recorded):
            raise UsageError(
                f"the artifact was compiled with {len(recorded)} models beside its source, not {len(given)}",
                where=str(self.folder),
            )
        for other in given or recorded:
            if not other.is_dir():
                raise UsageError(
                    "a model beside the source of the artifact is not there",
                    where=str(other),
                    hint="name all of them, each with --with FOLDER; `moec verify --files-only` needs none",
                )
        return tuple(given) or recorded

    def module(self, source: Module) -> Module:
        """The IR of the artifact, with weights loaded through `source`. Raises UnsafeInputError for malformed IR."""
        path = self.folder / MODULE_FILE
        if not path.is_file():
            raise UsageError("the artifact has no IR", where=str(path))
        op = parse_module(path.read_text(encoding="utf-8"), str(path))
        if not isinstance(op, ModuleOp):
            raise UnsafeInputError("the file does not hold a module", where=str(path))
        verify(op)
        return Module(op, source.weights, source.source, others=source.others)
