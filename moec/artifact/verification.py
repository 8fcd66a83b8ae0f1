"""Compares an artifact with its IR and the IR with its source, on tokens: router choices first, then the outputs.

Two experts can be so close that rounding decides between them. Such a tie is not an error: a token whose router had one
and whose result then differs is counted, and left out of the comparison with what follows it in its sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from moec.artifact.measurements import VerificationRow
from moec.artifact.options import LEAN_BYTES, Activations, OutputDType
from moec.artifact.runtime import OnnxModel
from moec.artifact.summary import layer_of_experts
from moec.artifact.tokens import TokenBatch, function_inputs, token_batch
from moec.dialects.builtin import ModuleOp, WeightOp
from moec.dialects.moe import ExpertsOp, ReplicaOp, RouteOp
from moec.errors import VerificationError
from moec.ir import Operation, TensorType
from moec.reference.agreement import record_route
from moec.reference.executor import Executor
from moec.reference.frame import Observation
from moec.reference.replica import replica_margin
from moec.weights.context import WeightContext
from moec.weights.expression import Expression

if TYPE_CHECKING:
    from moec.module import Module

BOUND = 1e-4
"""The largest difference that two float32 runs of one model may show, relative to the largest output."""
TIE_MARGIN = 1e-4
"""A choice of experts is a tie if it changes when values move by this share of the largest one: float32 rounding, grown
by the layers before it."""
_ROWS, _LENGTH = 2, 32


@dataclass(frozen=True)
class Tolerance:
    """What two runs of one model may show: the largest difference, and the margin below which a choice is a tie."""

    bound: float = BOUND
    tie_margin: float = TIE_MARGIN


_INT8_TOLERANCE = Tolerance(2e-2, 2e-2)
"""Products with activations rounded to int8 differ by up to 2 % of their largest value."""


def tolerance_of(activations: Activations) -> Tolerance:
    """What the numbers that packed weights are multiplied with allow."""
    return _INT8_TOLERANCE if activations is Activations.INT8 else Tolerance()


@dataclass(frozen=True)
class LayerChoices:
    """What the router of one layer chose for each token, in the order of the batch with padding.

    `experts` [tokens, K]: stored experts in ascending order, -1 for an empty slot. `tied` [tokens]: whether the last
    chosen expert and the first one left out are a tie; all false where the module has no `moe.route` to tell.
    """

    layer: str
    experts: NDArray[np.int64]
    tied: NDArray[np.bool_]


@dataclass(frozen=True)
class ReferenceRun:
    """Output float32 [rows, length, ...] of one run of the reference executor, and its router choices by layer."""

    output: NDArray[np.float32]
    choices: tuple[LayerChoices, ...]

    def tied_from(self, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """Which tokens [rows, length] come at or behind a tie of any layer in their sequence."""
        tied = np.zeros(shape, bool)
        for layer in self.choices:
            # experts on tokens times scores get a row for each slot of a token
            tied |= layer.tied.reshape(*shape, -1).any(-1)
        return np.logical_or.accumulate(tied, axis=1)


def verify_model(
    path: Path | None,
    module: Module,
    original: Module,
    *,
    exact: bool,
    batch: TokenBatch,
    dtype: OutputDType,
    activations: Activations = Activations.FLOAT32,
) -> list[VerificationRow]:
    """Compares the exported model `path` with the IR of `module`, and where `exact` that with the `original` source.

    `path` is None where there is no exported model. Raises VerificationError for the first comparison that fails.
    """
    tolerance = tolerance_of(activations)
    ir = run_reference(module.op, module.weights, batch)
    rows: list[VerificationRow] = []
    if exact:
        rows += compare_with_source(ir, run_reference(original.op, original.weights, batch), batch)
        require_rows(rows)
    if path is None:
        return rows
    name = "IR"
    if dtype is OutputDType.FLOAT16:
        name = "IR with weights in float16"
        ir = run_reference(module.op, HalfPrecisionWeights(module), batch)
    if activations is Activations.INT8:
        name += " with float32 activations"
        ir = run_reference(module.op, module.weights, batch, tolerance)
    lean = sum(item.stat().st_size for item in path.parent.iterdir()) > LEAN_BYTES
    rows += compare_artifact(path, ir, batch, name, lean=lean, tolerance=tolerance)
    require_rows(rows)
    return rows


class HalfPrecisionWeights(WeightContext):
    """The weights as an artifact in float16 has them: matrices and stacks of matrices rounded, vectors and their
    stacks not."""

    def __init__(self, module: Module) -> None:
        super().__init__(module.weights.checkpoint, module.weights.store)
        self._vectors = _stacks_of_vectors(module.op)

    def load(self, expression: Expression | str, index: int | slice | None = None) -> torch.Tensor:
        """As `WeightContext.load`, through float16 where the artifact stores it so."""
        value = super().load(expression, index)
        shape, dtype = self.shape_dtype(expression)
        matrix = len(shape) > 1 and str(expression) not in self._vectors
        return value.half().float() if matrix and dtype is torch.float32 else value


def _stacks_of_vectors(module: ModuleOp) -> frozenset[str]:
    """Sources of the weights that are a vector for each expert."""
    found = set()
    for op in module.walk():
        if isinstance(op, ExpertsOp):
            for group, weights, region in op.class_operands():
                arguments = region.block.arguments[1 : 1 + group.stacks]
                for value, argument in zip(weights[: group.stacks], arguments, strict=True):
                    assert isinstance(argument.type, TensorType)
                    if argument.type.rank == 1 and isinstance(value.defining_op, WeightOp):
                        found.add(value.defining_op.source)
    return frozenset(found)


def verification_batch(module: Module, *, text: Path | None = None, seed: int = 0) -> TokenBatch:
    """The tokens that `moec compile` and `moec verify` compare models on."""
    return token_batch(module, rows=_ROWS, length=_LENGTH, text=text, seed=seed)


def run_reference(
    module: ModuleOp, weights: WeightContext, batch: TokenBatch, tolerance: Tolerance = Tolerance()
) -> ReferenceRun:
    """Runs `main` in float32 and notes what every router chose, and between which experts it was a tie."""
    choices: list[LayerChoices] = []
    ties: dict[Operation | None, NDArray[np.bool_]] = {}

    def tap(seen: Observation) -> None:
        if isinstance(seen.op, RouteOp):
            ties[seen.op] = (record_route(seen).margin <= tolerance.tie_margin).numpy()
        if isinstance(seen.op, ReplicaOp):
            margin = replica_margin(seen.op, seen.operand(seen.op.gates))
            ties[seen.op] = (margin <= tolerance.tie_margin).numpy() | ties.get(seen.op.ids.defining_op, False)
        if not isinstance(seen.op, ExpertsOp):
            return
        ids, gates = seen.operand(seen.op.ids).numpy(), seen.operand(seen.op.gates).numpy()
        chosen = np.where(gates != 0, np.asarray(seen.op.stored, np.int64)[ids], -1)
        tied = ties.get(seen.op.ids.defining_op)
        choices.append(
            LayerChoices(
                layer_of_experts(seen.op),
                np.sort(chosen, axis=1),
                np.zeros(len(chosen), bool) if tied is None else tied,
            )
        )

    with torch.no_grad():
        executor = Executor(module, weights)
        results = executor.run(function_inputs(module.main, batch), observers=[tap])
    output = next(iter(results.values())).numpy().astype(np.float32)
    return ReferenceRun(output, tuple(choices))


def compare_with_source(ir: ReferenceRun, source: ReferenceRun, batch: TokenBatch) -> list[VerificationRow]:
    """The IR against the source model: router choices layer by layer, then outputs.

    Raises VerificationError that names the first layer whose router chooses other experts without a tie.
    """
    kept = batch.mask.astype(bool)
    clean, ties = kept.copy(), 0
    expected = {layer.layer: layer for layer in source.choices}
    rows = []
    for layer in ir.choices:
        other = expected.get(layer.layer)
        if other is None or other.experts.shape != layer.experts.shape:
            continue
        differs = (layer.experts != other.experts).any(axis=1).reshape(kept.shape) & clean
        wrong = differs & ~layer.tied.reshape(kept.shape)
        if wrong.any():
            raise VerificationError(
                f"IR against source: the router of {layer.layer} chooses other experts for {int(wrong.sum())} of "
                f"{int(clean.sum())} tokens, and none of them is a tie",
                where=f"{layer.layer}, router",
            )
        ties += int(differs.sum())
        clean &= ~np.logical_or.accumulate(differs, axis=1)
    if ir.choices:
        rows.append(_row("router choices, IR against source", 0.0, 0.0, ties, kept))
    difference = relative_difference(ir.output, source.output, clean)
    rows.append(_row("outputs, IR against source", difference, BOUND, ties, clean))
    return rows


def compare_artifact(
    path: Path,
    ir: ReferenceRun,
    batch: TokenBatch,
    name: str = "IR",
    *,
    lean: bool = False,
    tolerance: Tolerance = Tolerance(),
) -> list[VerificationRow]:
    """The exported model against the IR: in one pass, and for a decoder token by token through its cache.

    `name` is what the IR is called in the rows; `lean` as in `OnnxModel`.
    """
    model = OnnxModel(path, lean=lean)
    if not model.is_decoder:
        encoded = model.encode(batch.ids, batch.mask)
        return [artifact_row(f"artifact against {name}", encoded, ir, batch, tolerance)]
    whole, _ = model.step(batch.ids, batch.mask, model.empty_cache(len(batch.ids)))
    rows = [artifact_row(f"artifact against {name}", whole, ir, batch, tolerance)]
    if not model.has_cache:
        return rows
    half = batch.ids.shape[1] // 2
    logits, cache = model.step(batch.ids[:, :half], batch.mask[:, :half], model.empty_cache(len(batch.ids)))
    parts = [logits]
    for position in range(half, batch.ids.shape[1]):
        logits, cache = model.step(batch.ids[:, position : position + 1], batch.mask[:, : position + 1], cache)
        parts.append(logits)
    through_cache = np.concatenate(parts, axis=1)
    return [*rows, artifact_row(f"artifact through its cache against {name}", through_cache, ir, batch, tolerance)]


def require_rows(rows: list[VerificationRow]) -> None:
    """Raises VerificationError for the first row whose difference is above its bound."""
    for row in rows:
        if not row.relative_difference <= row.bound:
            raise VerificationError(
                f"{row.comparison}: the largest difference is {row.relative_difference:.3g} of the largest value, "
                f"allowed is {row.bound:g}"
            )


def relative_difference(actual: NDArray[np.float32], expected: NDArray[np.float32], kept: NDArray[np.bool_]) -> float:
    """Largest |actual - expected| over the largest |expected|, at the tokens that are kept; infinite for NaN."""
    if not kept.any():
        return 0.0
    scale = float(np.abs(expected[kept]).max())
    difference = float(np.abs(actual[kept] - expected[kept]).max())
    if np.isnan(difference):
        return float("inf")
    return difference / scale if scale else difference


def artifact_row(
    name: str, output: NDArray[np.float32], ir: ReferenceRun, batch: TokenBatch, tolerance: Tolerance = Tolerance()
) -> VerificationRow:
    """The row for `output` [rows, length, ...] against a run of the IR; tokens at or behind a tie may differ."""
    kept = batch.mask.astype(bool)
    scale = float(np.abs(ir.output[kept]).max()) or 1.0
    distance = np.abs(output - ir.output).reshape(*kept.shape, -1).max(axis=2)
    excused = kept & ir.tied_from(kept.shape) & ~(distance <= tolerance.bound * scale)
    difference = relative_difference(output, ir.output, kept & ~excused)
    return _row(name, difference, tolerance.bound, int(excused.sum()), kept)


def _row(name: str, difference: float, bound: float, ties: int, kept: NDArray[np.bool_]) -> VerificationRow:
    return VerificationRow(
        comparison=name, relative_difference=difference, bound=bound, ties=ties, tokens=int(kept.sum())
    )
