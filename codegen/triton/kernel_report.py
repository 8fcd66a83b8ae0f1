"""A row for each kernel of a package on each architecture: what its binary takes, and which limit it meets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moec.codegen.triton.ahead import Package, compile_launch
from moec.codegen.triton.architectures import Architecture
from moec.codegen.triton.metrics import Metrics, instructions_per_weight, measure
from moec.codegen.triton.prediction import Prediction, gpu_of, predict


@dataclass(frozen=True)
class KernelRow:
    """One binary. `phase` is empty for kernels without weights, for which there is no prediction either.

    `origin` says where the tile comes from.
    `instructions` are those of a thread per weight; None where they cannot be told from the binary.
    """

    architecture: str
    kind: str
    kernel: str
    phase: str
    tile: str
    origin: str
    metrics: Metrics
    instructions: float | None
    prediction: Prediction | None

    def as_json(self) -> dict[str, Any]:
        """The row as plain values."""
        found = asdict(self)
        if self.prediction is not None:
            found["prediction"]["bound"] = self.prediction.bound.value
        return found


def report_kernels(
    package: Package,
    architectures: Sequence[Architecture],
    progress: Callable[[str], None] = lambda step: None,
    *,
    only_products: bool = False,
) -> Iterator[KernelRow]:
    """Compiles every kernel for every architecture, or those of the two products of experts alone.

    Raises ResourceError for one that does not fit.
    """
    kinds = {kind.NAME: kind for kind in package.kinds}
    for architecture in architectures:
        for launch in package.launches(architecture):
            if only_products and not launch.product:
                continue
            progress(f"{launch.name} for {architecture.name}")
            compiled = compile_launch(launch, architecture, package.element)
            metrics = measure(compiled)
            instructions = instructions_per_weight(compiled, metrics)
            prediction = None
            tile = launch.tile
            if tile is not None and launch.phase is not None and instructions is not None:
                kind = kinds[launch.kind]
                bits = kind.INPUT_BITS if launch.product == "gate_up" else kind.OUTPUT_BITS
                prediction = predict(gpu_of(architecture.name), launch.phase, tile.block_m, bits, instructions)
            yield KernelRow(
                architecture.name,
                launch.kind,
                launch.name,
                launch.phase.value if launch.phase else "",
                "" if tile is None else f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.warps} s{tile.stages}",
                launch.origin.value if launch.origin else "",
                metrics,
                instructions,
                prediction,
            )
