"""One walk through the model, layer by layer over all sequences: a layer's weights are loaded once, and freed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moec.artifact.tokens import function_inputs
from moec.calibration.data import CalibrationData
from moec.calibration.gradients import Snapshot, walk_back
from moec.calibration.observation import BatchPlace, DenseGathering, LayerGathering, LayerRows, gather
from moec.calibration.sample import spread_rows
from moec.calibration.statistics import LayerStatistics
from moec.errors import MoecError, VerificationError
from moec.experts.dense import DenseLayer
from moec.experts.heads import AttentionHeads
from moec.experts.layer import MoeLayer
from moec.ir import Operation
from moec.reference.executor import Execution, Executor
from moec.reference.layers import AFTER_LAYERS, BEFORE_LAYERS, Segment, layer_segments
from moec.weights.finiteness import require_finite

if TYPE_CHECKING:
    from moec.module import Module


AnyLayer = MoeLayer | DenseLayer | AttentionHeads


@dataclass(frozen=True)
class LayerResult:
    """What one layer left: sums over all tokens, and rows of some. `gradient` as in `LayerSample`.

    What has no experts has no sums.
    """

    layer: AnyLayer
    statistics: LayerStatistics | None
    rows: LayerRows
    gradient: torch.Tensor | None


@dataclass(frozen=True)
class WalkSettings:
    """`reservoir` rows are kept of each layer; `batch` sequences run at once; `dtype` is that of the model's run."""

    reservoir: int
    batch: int
    gradients: bool
    dtype: torch.dtype


def walk(
    module: Module,
    layers: Sequence[AnyLayer],
    data: CalibrationData,
    settings: WalkSettings,
    keep: Callable[[LayerResult], None],
) -> None:
    """Gives `keep` the results of `layers` as soon as they are known: in order, with gradients from the last one on.

    Raises UnsafeInputError that names a weight which is not a number, and what the reference executor raises.
    """
    executor = Executor(module.op, module.weights, dtype=settings.dtype)
    segments = layer_segments(executor.function.body, executor.steps)
    places = _places(module, data, settings)
    here = {position: _layers_in(segment, layers) for position, segment in enumerate(segments)}
    observed = [position for position, found in here.items() if found]
    if not observed:
        return
    count = sum(len(place.rows) for place in places)
    gathered = {layer.name: _gathering(layer, count, settings.dtype) for layer in layers}
    snapshots: dict[int, list[Snapshot]] = {}
    last = observed[-1]
    with torch.no_grad(), ExitStack() as stack:
        executions = []
        for place in places:
            observer = gather(list(gathered.values()), place)
            executions.append(stack.enter_context(executor.session(place.inputs, observers=[observer])))
        for position, segment in enumerate(segments[: last + 1]):
            if settings.gradients and position >= observed[0]:
                snapshots[position] = [dict(execution.values) for execution in executions]
            _run(executor, segment, executions)
            for layer in here[position]:
                _require_numbers(module, segment, gathered[layer.name])
                if not settings.gradients:
                    found = gathered.pop(layer.name)
                    sums = None if isinstance(found, DenseGathering) else found.sums.result()
                    keep(LayerResult(layer, sums, found.rows, None))
                    found.release()
        if settings.gradients and last + 1 < len(segments):
            snapshots[last + 1] = [dict(execution.values) for execution in executions]
    if settings.gradients:
        behind = segments[last + 1 :]
        steps = tuple(step for segment in behind for step in segment.steps)
        ahead = [*segments[: last + 1], *([Segment(AFTER_LAYERS, steps, ())] if steps else [])]
        outputs = {output_of(layer): layer.name for layer in layers}
        for position, energy, rows in walk_back(executor, ahead, snapshots, places, outputs):
            for layer in here.get(position, ()):
                found = gathered.pop(layer.name)
                sums = None if isinstance(found, DenseGathering) else found.sums.result(energy[layer.name])
                keep(LayerResult(layer, sums, found.rows, rows[layer.name]))
                found.release()


def _run(executor: Executor, segment: Segment, executions: Sequence[Execution]) -> None:
    # outside of layers are tables as large as the vocabulary, which the executor reads in pieces if they are not kept
    outside = segment.name in (BEFORE_LAYERS, AFTER_LAYERS)
    with nullcontext() if outside else executor.weights_kept():
        for execution in executions:
            execution.run(segment.steps)


def _places(module: Module, data: CalibrationData, settings: WalkSettings) -> list[BatchPlace]:
    """The batches, and which of their tokens the reservoir takes."""
    chosen = spread_rows(data.tokens, settings.reservoir)
    places = []
    first_token, first_sequence = 0, 0
    for batch in data.batches(settings.batch, padding_in_front=module.source.kind == "decoder"):
        kept = torch.from_numpy(batch.mask).bool().flatten()
        real = kept.nonzero()[:, 0]
        inside = chosen[(chosen >= first_token) & (chosen < first_token + len(real))]
        start = int((chosen < first_token).sum())
        rows = real[inside - first_token]
        sequence = rows // batch.ids.shape[1] + first_sequence
        places.append(
            BatchPlace(
                inputs=function_inputs(module.main, batch),
                mask=torch.from_numpy(batch.mask),
                kept=None if bool(kept.all()) else kept,
                rows=rows,
                target=slice(start, start + len(rows)),
                sequence=sequence,
            )
        )
        first_token += len(real)
        first_sequence += len(batch.ids)
    return places


def output_of(layer: AnyLayer) -> Operation:
    """The operation that gives a layer's output."""
    if isinstance(layer, AttentionHeads):
        return layer.projection
    return layer.experts if isinstance(layer, MoeLayer) else layer.op


def _gathering(layer: AnyLayer, rows: int, dtype: torch.dtype) -> LayerGathering | DenseGathering:
    return LayerGathering(layer, rows, dtype) if isinstance(layer, MoeLayer) else DenseGathering(layer, rows, dtype)


def _layers_in(segment: Segment, layers: Sequence[AnyLayer]) -> list[AnyLayer]:
    ops = {step.op for step in segment.steps}
    return [layer for layer in layers if output_of(layer) in ops]


def _require_numbers(module: Module, segment: Segment, found: LayerGathering | DenseGathering) -> None:
    sums_are_finite = isinstance(found, DenseGathering) or found.sums.is_finite()
    if bool(sums_are_finite and found.rows.y.isfinite().all()):
        return
    read = {value.defining_op: None for step in segment.steps for value in step.op.operands}
    require_finite(module.weights, read, where=found.layer.name)
    raise _overflow(found.layer)


def _overflow(layer: AnyLayer) -> MoecError:
    return VerificationError(
        "the layer's outputs are no finite numbers although its weights are",
        where=layer.name,
        hint="an earlier layer may hold broken weights; calibrate with dtype=float64 to rule out overflow",
    )
