"""Writes the ledger: compares the module before and after each pass, and stops a pass that claims too much."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from moec.artifact.ledger import LOSS_DIGITS, CheckOutcome, LayerError, LedgerEntry, ModelSize, round_error
from moec.artifact.loss import batch_loss
from moec.artifact.measurement import LayerChange, measure_change
from moec.artifact.measurements import PassTime
from moec.artifact.options import Check
from moec.artifact.summary import model_size
from moec.artifact.tokens import TokenBatch, function_inputs, token_batch
from moec.dialects.builtin import ModuleOp
from moec.errors import VerificationError
from moec.module import Module
from moec.pipeline.base import Claim
from moec.pipeline.instruments import Instrument, PassExecution, fingerprint
from moec.reference.executor import Executor
from moec.weights.finiteness import require_finite

if TYPE_CHECKING:
    from pathlib import Path

EXACT_BOUND = 1e-9
"""Largest relative difference, in float64, that a pass which claims to be exact may cause."""


class LedgerRecorder(Instrument):
    """Observes a pass manager and collects one `LedgerEntry` and one `PassTime` per pass."""

    def __init__(self, module: Module, check: Check, *, seed: int = 0, text: Path | None = None) -> None:
        self.entries: list[LedgerEntry] = []
        self.times: list[PassTime] = []
        self._module = module
        self._check = check
        self._seed = seed
        self._batch: TokenBatch | None = None
        if check is not Check.NONE and module.source.kind != "module":
            rows, length = (2, 24) if check is Check.CHANGED else (4, 96)
            self._batch = token_batch(module, rows=rows, length=length, text=text, seed=seed)
        self._print = ""
        self._before: ModuleOp | None = None
        self._size: ModelSize | None = None
        self._seconds = 0.0
        # behind the last lossy pass; passes that are exact leave it as it is
        self._loss: float | None = None

    def before_pass(self, execution: PassExecution) -> None:
        with self._timed():
            self._print = fingerprint(execution.root)
            if self._size is None:
                self._size = model_size(self._module)
            if self._batch is not None:
                clone = execution.root.clone()
                assert isinstance(clone, ModuleOp)
                self._before = clone

    def after_pass(self, execution: PassExecution) -> None:
        with self._timed():
            before = self._size
            assert before is not None
            changed = fingerprint(execution.root) != self._print
            after = model_size(self._module) if changed else before
            outcome, errors = self._compare(execution, changed)
            loss_change = self._loss_change() if outcome is CheckOutcome.MEASURED else None
            self.entries.append(
                LedgerEntry(
                    pass_text=execution.text,
                    claim=execution.claim.value,
                    outcome=outcome,
                    layer_errors=errors,
                    before=before,
                    after=after,
                    seed=self._seed,
                    loss_change=loss_change,
                )
            )
            self._size, self._before = after, None
        self.times.append(
            PassTime(
                pass_text=execution.text, seconds=round(execution.seconds, 4), ledger_seconds=round(self._seconds, 4)
            )
        )
        self._seconds = 0.0

    def _compare(self, execution: PassExecution, changed: bool) -> tuple[CheckOutcome, tuple[LayerError, ...]]:
        if not changed and self._check is not Check.FULL:
            return CheckOutcome.UNCHANGED, ()
        if self._batch is None or self._before is None:
            return CheckOutcome.NOT_CHECKED, ()
        before = Module(self._before, self._module.weights, self._module.source)
        inputs = (function_inputs(before.main, self._batch), function_inputs(self._module.main, self._batch))
        changes = measure_change(
            before,
            self._module,
            inputs,
            check=self._check,
            exact=execution.claim is Claim.EXACT,
            layerwise=execution.instance.layerwise,
        )
        if execution.claim is Claim.LOSSY:
            return CheckOutcome.MEASURED, tuple(map(_layer_error, changes))
        for change in changes:
            if change.router_differences or not change.error <= EXACT_BOUND:
                if not math.isfinite(change.error):
                    require_finite(self._module.weights, self._before.walk(), where=change.layer)
                raise _too_much(execution, change)
        return CheckOutcome.WITHIN_BOUND, ()

    def _loss_change(self) -> float | None:
        """What a lossy pass adds to the loss; None where the model is no decoder, or its logits are no numbers."""
        if self._module.source.kind != "decoder":
            return None
        assert self._before is not None
        before = self._loss_of(self._before) if self._loss is None else self._loss
        self._loss = self._loss_of(self._module.op)
        change = self._loss - before
        return round(change, LOSS_DIGITS) if math.isfinite(change) else None

    def _loss_of(self, op: ModuleOp) -> float:
        """Nats per token, in float64."""
        assert self._batch is not None
        with torch.no_grad():
            results = Executor(op, self._module.weights, dtype=torch.float64).run(function_inputs(op.main, self._batch))
        return batch_loss(next(iter(results.values())).numpy(), self._batch)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start


def _layer_error(change: LayerChange) -> LayerError:
    compared = change.worst_expert >= 0
    return LayerError(
        layer=change.layer,
        relative_error=round_error(change.relative_error),
        expert_error=round_error(change.expert_error) if compared else None,
        worst_expert=change.worst_expert if compared else None,
        router_differences=change.router_differences,
    )


def _too_much(execution: PassExecution, change: LayerChange) -> VerificationError:
    if change.router_differences:
        what = f"the router of {change.layer} sends {change.router_differences} tokens to other experts"
    else:
        part = f"expert {change.worst_expert} of " if change.expert_error > change.relative_error else ""
        what = f"{part}{change.layer} changes by {change.error:.2g} of its largest value (allowed: {EXACT_BOUND:g})"
    return VerificationError(
        f"the pass {execution.text} claims to be exact, but {what}",
        where=f"{execution.target}, {change.layer}",
        hint="let the pass claim `lossy`, or mend it",
    )
