"""`moec verify`: an artifact checked again, from files to numbers; what is wrong is named down to the tensor."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from moec.artifact.checkpoint import compare_checkpoint, differing_tensor, emit_checkpoint
from moec.artifact.compilation import is_exact, source_files
from moec.artifact.emission import emit_folder
from moec.artifact.kernel_check import compare_kernels
from moec.artifact.localisation import Difference, first_difference
from moec.artifact.manifest import check_files, describe_file
from moec.artifact.measurements import VerificationRow
from moec.artifact.opened import MODEL_FILE, MODULE_FILE, Artifact
from moec.artifact.options import (
    Activations,
    Backend,
    CheckpointDType,
    CheckpointOptions,
    OptimizeFor,
    OutputDType,
    default_store,
)
from moec.artifact.summary import layer_of
from moec.artifact.verification import require_rows, verification_batch, verify_model
from moec.errors import MoecError, UsageError, VerificationError
from moec.frontend.huggingface import load_huggingface
from moec.module import Module
from moec.pipeline.manager import PassManager, Pipeline
from moec.weights.store import WeightStore


def verify_folder(
    folder: Path,
    *,
    against: Path | None = None,
    others: Sequence[Path] = (),
    text: Path | None = None,
    store: Path | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> list[VerificationRow]:
    """Checks digests, then the artifact against its IR and the IR against its source, on tokens.

    `against` is the source where it is not the folder that the artifact was compiled from; it must hold the same model.
    `others` are all models beside it where they have moved.
    `store` has the tensors that passes computed.
    Raises VerificationError that names what differs, by layer and tensor where there is one, and UsageError,
    UnsafeInputError or UnsupportedModelError for inputs that cannot be read.
    """
    artifact = Artifact.open(folder)
    progress("checking digests")
    damage = _failure(lambda: check_files(folder, artifact.manifest))
    try:
        source, beside = artifact.source_folder(against), artifact.other_folders(others)
    except UsageError as error:
        # without the source nothing more can be found out, so damage goes first
        error.message = f"all files are as the manifest lists them, and nothing else was compared: {error.message}"
        raise damage or error from None
    progress("loading the source")
    original = load_huggingface(source, WeightStore(store or default_store()), beside)
    module = artifact.module(original)
    foreign = _foreign_file(artifact, source, beside)
    build = artifact.manifest.build
    pipeline = Pipeline.parse(build.pipeline)
    batch = verification_batch(original, text=text, seed=build.seed)
    progress("comparing")
    rows: list[VerificationRow] = []

    def compare() -> None:
        rows.extend(
            verify_model(
                artifact.onnx if artifact.has(Backend.ONNX) else None,
                module,
                original,
                exact=is_exact(pipeline),
                batch=batch,
                dtype=OutputDType(build.dtype),
                activations=Activations(build.activations),
            )
        )
        if artifact.has(Backend.HUGGINGFACE):
            progress("comparing the checkpoint")
            rows.extend(compare_checkpoint(artifact.checkpoint, module, batch, CheckpointDType(build.checkpoint_dtype)))
            require_rows(rows)
        if artifact.has(Backend.TRITON):
            progress("comparing the kernels")
            rows.extend(compare_kernels(artifact.kernels, module, batch, OutputDType(build.dtype)))
            require_rows(rows)

    wrong = _failure(compare)
    if damage is None and wrong is None and foreign is None:
        return rows
    progress("finding the difference")
    found = _locate(artifact, module, original, pipeline)
    reasons = [failure.message for failure in (damage, wrong) if failure is not None]
    if foreign is not None:
        reasons.append(f"the source is not the one that was compiled: {foreign} differs")
    if found is not None:
        raise VerificationError(
            f"{found.what}: {found.tensor} ({'; '.join(reasons)})",
            where=f"{folder}, {found.where}",
            hint="compile again, or copy the artifact again",
        )
    first = damage or wrong
    if first is None:
        # Files of the source changed that the function does not depend on, and all comparisons hold.
        return rows
    raise first


def verify_files(folder: Path) -> int:
    """Compares the files of an artifact with its manifest; returns how many.

    Raises VerificationError that names the first that differs, and UsageError or UnsafeInputError for a folder that is
    no artifact. What the files compute is not looked at.
    """
    artifact = Artifact.open(folder)
    check_files(folder, artifact.manifest)
    return len(artifact.manifest.files)


def _failure(check: Callable[[], None]) -> MoecError | None:
    """What a check raises: the search for its cause comes first."""
    try:
        check()
    except MoecError as error:
        return error
    return None


def _foreign_file(artifact: Artifact, source: Path, others: Sequence[Path]) -> str | None:
    """The first file of the source, or of a model beside it, that is not as it was at compile time."""
    manifest = artifact.manifest
    for folder, recorded in zip((source, *others), (manifest.source.files, *manifest.others), strict=True):
        present = source_files(folder)
        for name in {**recorded, **present}:
            if recorded.get(name) != present.get(name):
                return name if folder is source else str(folder / name)
    return None


def _locate(artifact: Artifact, module: Module, original: Module, pipeline: Pipeline) -> Difference | None:
    """Where the artifact differs from a new emission of its IR, or its IR from what the passes make of the source."""
    build = artifact.manifest.build
    if artifact.has(Backend.HUGGINGFACE):
        found = _locate_in_checkpoint(artifact, module)
        if found is not None:
            return found
    if artifact.has(Backend.ONNX):
        found = _locate_in_onnx(artifact, module)
        if found is not None:
            return found
    calibration = None
    if build.calibration is not None:
        calibration = Path(artifact.measurements.calibration)
        if not calibration.is_file() or describe_file(calibration) != build.calibration:
            return None
    PassManager(pipeline).run(
        original.op, weights=original.weights, module=original, seed=build.seed, calibration_file=calibration
    )
    return _differing_operation(module, original)


def _locate_in_checkpoint(artifact: Artifact, module: Module) -> Difference | None:
    build = artifact.manifest.build
    options = CheckpointOptions(build.uniform, CheckpointDType(build.checkpoint_dtype), build.shard_bytes)
    with tempfile.TemporaryDirectory(prefix=".moec-verify-", dir=artifact.folder.parent) as scratch:
        emit_checkpoint(module, Path(scratch), options)
        try:
            name = differing_tensor(artifact.checkpoint, Path(scratch))
        except MoecError as error:
            return Difference(f"the checkpoint cannot be read: {error.message}", "huggingface", "a weight file")
    if name is None:
        return None
    return Difference("a tensor of the checkpoint is not what the IR says", layer_of(name), name)


def _locate_in_onnx(artifact: Artifact, module: Module) -> Difference | None:
    build = artifact.manifest.build
    with tempfile.TemporaryDirectory(prefix=".moec-verify-", dir=artifact.folder.parent) as scratch:
        again = Path(scratch)
        emit_folder(
            module,
            again,
            target=build.target,
            dtype=OutputDType(build.dtype),
            optimize_for=OptimizeFor(build.optimize_for),
            activations=Activations(build.activations),
            weights_in_place=False,
        )
        return first_difference(artifact.onnx, again / MODEL_FILE)


def _differing_operation(module: Module, expected: Module) -> Difference | None:
    """The first operation whose name or attributes are not what the passes make of the source."""
    for mine, other in zip(module.op.walk(), expected.op.walk(), strict=False):
        if mine.name != other.name or mine.attributes != other.attributes:
            place = other.location.name or other.attributes.get("weight_name", other.name)
            return Difference(
                "an operation of the IR is not what the passes make of the source", layer_of(place), place
            )
    counts = [sum(1 for _ in item.op.walk()) for item in (module, expected)]
    if counts[0] != counts[1]:
        return Difference(f"the IR has {counts[0]} operations instead of {counts[1]}", "", MODULE_FILE)
    return None
