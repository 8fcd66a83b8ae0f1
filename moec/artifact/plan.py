"""What a compilation will cost, predicted from the config alone: no weight is read and nothing is traced.

The constants were fitted to compilations of the demo model and of SmolLM2-135M on an otherwise idle core; every
compilation records prediction and outcome in measurements.json, so that a drift can be seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moec.artifact.measurements import Cost
from moec.artifact.options import COPIED_FILES, LEAN_BYTES, Check, CompileOptions
from moec.frontend.model_kind import ModelShape, model_shape
from moec.frontend.other_sources import require_equal_configs

_MIB = 1 << 20
_START_SECONDS = 5.0  # what the first trace of a process costs
_LAYER_SECONDS = 0.45  # tracing, passes and emission of one layer, whatever its width
_EXPERT_SECONDS = 0.004  # emission of one expert
_WRITTEN_BYTES_PER_SECOND = 400 * _MIB  # weights through conversion, digest and disk
_COMPARED_SECONDS = 3.5e-8  # per parameter: once through the ledger in float64, once through the verification
_GRAPH_BYTES_PER_LAYER = 60_000  # model.onnx, module.mlir and the report
_START_MEMORY = 370 * _MIB
_COPIES = 2.5  # of the largest matrix in float32: as read, converted, and on its way


@dataclass(frozen=True)
class Plan:
    """The prediction for one source and set of options. `largest` is the largest matrix in bytes of float32."""

    architecture: str
    parameters: int
    layers: int
    experts: int
    largest: int
    cost: Cost


def plan_compilation(source: Path, options: CompileOptions) -> Plan:
    """Predicts time, anonymous memory and disk of `moec compile` on a Hugging Face folder.

    Raises UsageError, UnsupportedModelError or UnsafeInputError as the frontend does for config.json, and UsageError
    for a recipe that is not for such a model, or for models beside it that differ from it.
    """
    shape = model_shape(source)
    options.requested_pipeline(shape.kind)
    for other in options.others:
        require_equal_configs(source, other)
    # the result has at most the weights of all
    count = shape.parameters * (1 + len(options.others))
    written = 0 if options.weights_in_place else _written_bytes(shape, count * options.dtype.itemsize, options)
    companions = sum((source / name).stat().st_size for name in COPIED_FILES if (source / name).is_file())
    comparisons = int(options.check is not Check.NONE) + int(options.verify)
    seconds = (
        _START_SECONDS
        + _LAYER_SECONDS * shape.layers
        + _EXPERT_SECONDS * shape.experts
        + written / _WRITTEN_BYTES_PER_SECOND
        + _COMPARED_SECONDS * comparisons * count
    )
    memory = _START_MEMORY + round(_COPIES * shape.largest)
    if options.verify and written <= LEAN_BYTES:
        memory += written
    return Plan(
        architecture=shape.architecture,
        parameters=shape.parameters,
        layers=shape.layers,
        experts=shape.experts,
        largest=shape.largest,
        cost=Cost(
            seconds=round(seconds, 1),
            memory_bytes=memory,
            disk_bytes=written + companions + _GRAPH_BYTES_PER_LAYER * max(shape.layers, 1),
        ),
    )


def _written_bytes(shape: ModelShape, everything: int, options: CompileOptions) -> int:
    """Bytes of the weights in the artifact, `everything` if nothing makes them smaller."""
    from moec.pipeline.recipes import requested_size

    wanted = requested_size(options.recipe, options.budget, shape.kind)
    if wanted is None:
        return everything
    if wanted.bytes is not None:
        return min(wanted.bytes, everything)
    assert wanted.share is not None
    return everything - round((1 - wanted.share) * shape.expert_parameters * options.dtype.itemsize)
