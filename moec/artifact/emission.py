"""Writes what a backend makes of a module, and what users of the model need beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

from moec.artifact.options import COPIED_FILES, Activations, OptimizeFor, OutputDType
from moec.codegen.onnx.emit import OnnxReport, emit_onnx
from moec.codegen.onnx.targets import parse_target
from moec.ir import DType
from moec.module import Module

_DTYPES = {OutputDType.FLOAT32: DType.F32, OutputDType.FLOAT16: DType.F16}


def emit_folder(
    module: Module,
    folder: Path,
    *,
    target: str,
    dtype: OutputDType,
    optimize_for: OptimizeFor,
    activations: Activations,
    weights_in_place: bool,
) -> OnnxReport:
    """Writes the ONNX model into `folder`, with tokenizer, chat template and generation config of the source.

    The copied files stay as they are; nothing in them is run or rendered. Raises what `emit_onnx` raises.
    """
    report = emit_onnx(
        module,
        folder,
        target=parse_target(target),
        dtype=_DTYPES[dtype],
        optimize_for=optimize_for,
        activations=activations,
        weights_in_place=weights_in_place,
    )
    if module.source.folder is not None:
        for name in COPIED_FILES:
            path = module.source.folder / name
            if path.is_file() and not (folder / name).exists():
                shutil.copyfile(path, folder / name)
    return report
