"""Writes the ledger: compares the module before and after each pass, and stops a pass that claims too much."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moec.artifact.ledger import CheckOutcome, LayerError, LedgerEntry, ModelSize, round_error
from moec.artifact.measurements import PassTime
from moec.artifact.options import Check
from moec.artifact.probe import differing_expert, run_with_taps, same_experts
from moec.artifact.summary import model_size
from moec.artifact.tokens import TokenBatch, token_batch
from moec.dialects.builtin import ModuleOp
from moec.errors import VerificationError
from moec.pipeline.base import Claim
from moec.pipeline.instruments import Instrument, PassExecution, fingerprint

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from moec.module import Module

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
        self._values: dict[str, torch.Tensor] | None = None
        self._seconds = 0.0

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
            self.entries.append(
                LedgerEntry(
                    pass_text=execution.text,
                    claim=execution.claim.value,
                    outcome=outcome,
                    layer_errors=errors,
                    before=before,
                    after=after,
                    seed=self._seed,
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
        if self._values is None:
            self._values = run_with_taps(self._before, self._module.weights, self._batch)
        values = run_with_taps(self._module.op, self._module.weights, self._batch)
        errors = list(_relative_errors(self._values, values))
        self._values = values
        if execution.claim is Claim.LOSSY:
            return CheckOutcome.MEASURED, tuple(
                LayerError(layer=name, relative_error=round_error(error)) for name, error in errors
            )
        for name, error in errors:
            if not error <= EXACT_BOUND:
                raise _too_much(execution, name, error)
        for before, after in same_experts(self._before, self._module.op):
            found = differing_expert(before, after, self._module.weights, EXACT_BOUND, self._seed)
            if found is not None:
                raise _too_much(execution, f"expert {found.expert} of {found.layer}", found.error)
        return CheckOutcome.WITHIN_BOUND, ()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start


def _relative_errors(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> Iterator[tuple[str, float]]:
    """(layer, largest difference relative to the largest value) of every value that both runs have."""
    for name, reference in before.items():
        value = after.get(name)
        if value is None or value.shape != reference.shape:
            continue
        scale = float(reference.abs().max())
        difference = float((value - reference).abs().max())
        yield name, difference / scale if scale else difference


def _too_much(execution: PassExecution, where: str, error: float) -> VerificationError:
    return VerificationError(
        f"the pass {execution.text} claims to be exact, but it changes {where} by {error:.2g} of its largest value "
        f"(allowed: {EXACT_BOUND:g})",
        where=f"{execution.target}, {where}",
        hint="let the pass claim `lossy`, or mend it",
    )
