"""The kernels of an artifact against its IR, layer by layer, on rows that the model itself makes of real tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moec.artifact.measurements import VerificationRow
from moec.artifact.options import OutputDType
from moec.artifact.tokens import TokenBatch, function_inputs
from moec.artifact.verification import TIE_MARGIN
from moec.codegen.triton.ahead import Package
from moec.codegen.triton.architectures import Architecture
from moec.codegen.triton.beside import block_of
from moec.codegen.triton.binaries import BINARIES_FOLDER, write_binaries
from moec.codegen.triton.emit import emit_triton
from moec.codegen.triton.reading import layers_of
from moec.codegen.triton.rendering import PACKAGE_NAME
from moec.codegen.triton.running import LayerRows, default_place, run_layers
from moec.codegen.triton.spec import Element
from moec.dialects.moe import ExpertsOp, RouteOp
from moec.ir import Operation
from moec.module import Module
from moec.reference.agreement import record_route
from moec.reference.executor import Executor
from moec.reference.frame import Observation

KERNEL_BOUNDS = {OutputDType.FLOAT32: 1e-5, OutputDType.FLOAT16: 2e-3, OutputDType.BFLOAT16: 2e-2}
"""The largest difference of a layer's output, relative to its largest value, by what the kernels multiply in."""
_MANY, _ONE = 8, 1


@dataclass
class _Rows:
    """Rows of one layer: what goes in, what comes out, and which tokens' choice of experts is a tie."""

    x: torch.Tensor
    y: torch.Tensor
    tied: torch.Tensor


@dataclass
class _Tap:
    """Collects rows; `results` are the operations that give a layer's output, its shared experts added."""

    keep: torch.Tensor
    results: dict[Operation, int]
    layers: list[_Rows] = field(default_factory=list)
    tied: dict[RouteOp, torch.Tensor] = field(default_factory=dict)

    def __call__(self, seen: Observation) -> None:
        if isinstance(seen.op, RouteOp):
            self.tied[seen.op] = record_route(seen).margin <= TIE_MARGIN
        elif isinstance(seen.op, ExpertsOp):
            route = seen.op.ids.defining_op
            assert isinstance(route, RouteOp)
            rows = [seen.operand(seen.op.x), seen.results[0], self.tied[route]]
            self.layers.append(_Rows(*(value[self.keep].clone() for value in rows)))
        if seen.op in self.results and not isinstance(seen.op, ExpertsOp):
            y = seen.results[0]
            self.layers[self.results[seen.op]].y = y.reshape(-1, y.shape[-1])[self.keep].clone()


def emit_kernels(module: Module, folder: Path, dtype: OutputDType) -> None:
    """Writes the package of kernels into `folder`. Raises what `emit_triton` raises."""
    emit_triton(module, folder, element=Element(dtype.value))


def compile_kernels(folder: Path, architectures: Sequence[Architecture]) -> None:
    """Adds binaries for GPU architectures beside the package in `folder`.

    Raises ResourceError where one does not fit, UsageError without triton.
    """
    write_binaries(Package.open(folder / PACKAGE_NAME), architectures, folder / BINARIES_FOLDER)


def compare_kernels(folder: Path, module: Module, batch: TokenBatch, dtype: OutputDType) -> list[VerificationRow]:
    """Every layer on a few tokens: those for many tokens, and those for one. A token whose choice is a tie is left out.

    Runs on a GPU where there is one, else in the interpreter. Raises UsageError without triton.
    """
    tokens = torch.from_numpy(batch.mask.astype(bool).reshape(-1)).nonzero()[:_MANY, 0]
    results = [block_of(layer).result.defining_op for layer in layers_of(module)]
    tap = _Tap(tokens, {op: number for number, op in enumerate(results) if op is not None})
    with torch.no_grad():
        Executor(module.op, module.weights).run(function_inputs(module.main, batch), observers=[tap])
    package = folder / PACKAGE_NAME
    requests = [
        LayerRows(package, number, rows.x[:count]) for number, rows in enumerate(tap.layers) for count in (_MANY, _ONE)
    ]
    place = default_place()
    found = run_layers(requests, place)
    result = []
    for first, text in enumerate(("many tokens", "one token")):
        differences, ties, count = [0.0], 0, 0
        for rows, output in zip(tap.layers, found[first::2], strict=True):
            y = output.y
            kept = ~rows.tied[: len(y)]
            scale = float(rows.y.abs().max()) or 1.0
            distance = (y - rows.y[: len(y)])[kept].abs().amax() if kept.any() else torch.tensor(0.0)
            differences.append(float(distance.nan_to_num(torch.inf)) / scale)
            ties += int((~kept).sum())
            count += len(y)
        result.append(
            VerificationRow(
                comparison=f"kernels for {text} {place.value} against IR",
                relative_difference=max(differences),
                bound=KERNEL_BOUNDS[dtype],
                ties=ties,
                tokens=count // max(len(tap.layers), 1),
            )
        )
    return result
