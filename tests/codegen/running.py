"""Runs a module as ONNX and on the reference executor."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from moec.codegen.onnx.emit import MODEL_FILE, OnnxReport, emit_onnx
from moec.dialects.builtin import FuncOp, ModuleOp
from moec.ir import Operation, TensorType, Value
from moec.module import Module, SourceFacts
from moec.reference.executor import Executor
from moec.weights.context import WeightContext

Feeds = dict[str, torch.Tensor]


def module_of(op: ModuleOp, weights: Feeds | None = None) -> Module:
    """A module with its weights in memory."""
    return Module(op, WeightContext(in_memory=weights or {}), SourceFacts("module"))


def load(folder: Path) -> onnxruntime.InferenceSession:
    """The model in a folder, on one thread."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(folder / MODEL_FILE), options, providers=["CPUExecutionProvider"])


def operators(folder: Path) -> Counter[str]:
    """Operators of the nodes in the file of a folder, those of its functions included."""
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    graphs = [model.graph, *model.functions]
    return Counter(node.op_type for graph in graphs for node in graph.node)


def run(session: onnxruntime.InferenceSession, feeds: Feeds) -> dict[str, NDArray[Any]]:
    """Results by name."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {name: value.numpy() for name, value in feeds.items()}), strict=True))


def emit_and_run(
    module: Module, feeds: Feeds, folder: Path, **options: Any
) -> tuple[dict[str, NDArray[Any]], OnnxReport]:
    """Results of the ONNX file of a module, and the report of its emission."""
    report = emit_onnx(module, folder, **options)
    return run(load(folder), feeds), report


def reference(module: Module, feeds: Feeds) -> dict[str, NDArray[Any]]:
    """Results of the reference executor in float64."""
    wide = {name: value.double() if value.is_floating_point() else value for name, value in feeds.items()}
    with torch.no_grad():
        found = Executor(module.op, module.weights, dtype=torch.float64).run(wide)
    return {name: value.numpy() for name, value in found.items()}


def assert_close(found: NDArray[Any], expected: NDArray[Any], tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` of the largest expected number; NaN and infinity only where expected."""
    assert found.shape == expected.shape
    scale = max(1.0, float(np.abs(expected[np.isfinite(expected)]).max(initial=0)))
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * scale)


def one_operation(argument_types: dict[str, TensorType], make: Any) -> ModuleOp:
    """The module main(arguments) -> all results of the operation that `make(*arguments)` gives, called y0, y1, ..."""
    function = FuncOp.build("main", list(argument_types.values()), arg_names=list(argument_types))
    arguments: list[Value] = list(function.arguments)
    op: Operation = make(*arguments)
    function.body.append(op)
    function.finish(list(op.results), [f"y{index}" for index in range(len(op.results))])
    return ModuleOp.build([function])
