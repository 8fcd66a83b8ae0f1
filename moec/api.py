"""moec from Python: `load` gives a module to look at, to run passes on or to run; `compile` writes an artifact.

import moec
module = moec.load("path/to/model")
result = moec.compile("path/to/model", "out", pipeline="my-pass{layer=3}")
print(result.report.artifact_bytes)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moec.artifact.options import (
    SHARD_BYTES,
    Activations,
    Backend,
    Check,
    CheckpointDType,
    CheckpointOptions,
    CompileOptions,
    OptimizeFor,
    OutputDType,
    default_store,
)
from moec.module import Module

if TYPE_CHECKING:
    import torch
    from torch import nn

    from moec.artifact.compilation import CompileResult
    from moec.codegen.huggingface.emit import HuggingFaceReport
    from moec.frontend.experts_adapter import ExpertsAdapter
    from moec.frontend.torch_export import DynamicSizes
    from moec.pipeline.manager import PipelineReport


def load(
    source: str | Path | nn.Module,
    example_inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor] = (),
    *,
    dynamic: DynamicSizes | None = None,
    experts: Sequence[ExpertsAdapter] = (),
    result_names: Sequence[str] = (),
    others: Sequence[str | Path] = (),
) -> Module:
    """The IR of a Hugging Face folder, or of a torch module with example inputs; no weight of a folder is read.

    `others` are folders of models of the same shape and tokens. The other arguments are for torch modules:
    `moec.frontend.torch_export.load_torch` explains them. Raises UsageError,
    UnsupportedModelError or UnsafeInputError as the frontends do.
    """
    if isinstance(source, str | Path):
        from moec.frontend.huggingface import load_huggingface

        return load_huggingface(source, others=others)
    from moec.frontend.torch_export import load_torch

    return load_torch(source, example_inputs, dynamic=dynamic, experts=experts, result_names=result_names)


def compile(
    source: str | Path,
    output: str | Path,
    *,
    pipeline: str = "",
    target: str = "portable",
    dtype: str = "float32",
    optimize_for: str = "decode",
    activations: str = "float32",
    check: str = "changed",
    seed: int = 0,
    weights_in_place: bool = False,
    verify: bool = True,
    text: str | Path | None = None,
    store: str | Path | None = None,
    recipe: str | Path = "",
    budget: str = "",
    others: Sequence[str | Path] = (),
    calibration: str | Path | None = None,
    emit: Sequence[str] = ("onnx",),
    uniform: bool = False,
    checkpoint_dtype: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    architectures: Sequence[str] = (),
    replace: bool = False,
) -> CompileResult:
    """Compiles a Hugging Face folder into the artifact folder `output`; the options are those of `moec compile`, where
    `others` is `--with`.

    Raises the subclasses of MoecError, and ValueError for a value that an option does not have.
    """
    from moec.artifact.compilation import compile_folder

    options = CompileOptions(
        pipeline=pipeline,
        target=target,
        dtype=OutputDType(dtype),
        optimize_for=OptimizeFor(optimize_for),
        activations=Activations(activations),
        check=Check(check),
        seed=seed,
        weights_in_place=weights_in_place,
        verify=verify,
        text=None if text is None else Path(text),
        store=default_store() if store is None else Path(store),
        recipe=str(recipe),
        budget=budget,
        others=tuple(Path(other) for other in others),
        calibration=None if calibration is None else Path(calibration),
        emit=tuple(sorted({Backend(name) for name in emit}, key=list(Backend).index)),
        checkpoint=CheckpointOptions(uniform, CheckpointDType(checkpoint_dtype), shard_bytes),
        architectures=tuple(architectures),
    )
    return compile_folder(Path(source), Path(output), options, replace=replace)


def write_checkpoint(
    module: Module,
    output: str | Path,
    *,
    uniform: bool = False,
    checkpoint_dtype: str = "auto",
    shard_bytes: int = SHARD_BYTES,
) -> HuggingFaceReport:
    """Writes `module` as the Hugging Face folder `output`, which appears when it is whole.

    Nothing is compared; `compile` with `emit=["huggingface"]` verifies what it writes. Raises UsageError if `output`
    exists or if `module` did not come from a Hugging Face folder, UnsupportedModelError if transformers has no model of
    its operations, and ValueError for an unknown element type.
    """
    from moec.artifact.checkpoint import emit_checkpoint
    from moec.artifact.folder import atomic_folder

    options = CheckpointOptions(uniform, CheckpointDType(checkpoint_dtype), shard_bytes)
    with atomic_folder(Path(output)) as folder:
        return emit_checkpoint(module, folder, options)


def run_passes(
    module: Module, pipeline: str, *, seed: int = 0, calibration: str | Path | None = None
) -> PipelineReport:
    """Runs a pipeline on `module` in place, and gives its statistics, refusals and remarks."""
    from moec.pipeline.manager import PassManager, Pipeline

    manager = PassManager(Pipeline.parse(pipeline))
    file = None if calibration is None else Path(calibration)
    return manager.run(module.op, weights=module.weights, module=module, seed=seed, calibration_file=file)
