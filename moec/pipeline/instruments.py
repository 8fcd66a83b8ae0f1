"""Instruments watch a pipeline run: printing, timing, and whatever else wants to know of each pass."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from moec.ir.operation import Operation
from moec.ir.printer import print_operation
from moec.pipeline.base import Claim, Pass, PassContext
from moec.pipeline.options import pass_text

Write = Callable[[str], None]


@dataclass
class PassExecution:
    """One run of one pass on one operation.

    `root` is the whole module, `op` what the pass runs on (the module, or one function of it); `index` counts the
    runs of the pipeline from 0. `seconds` (wall clock) is set once the pass has run, verification not included.
    """

    instance: Pass
    root: Operation
    op: Operation
    context: PassContext
    index: int
    seconds: float = 0.0

    @property
    def pass_name(self) -> str:
        return self.instance.pass_name

    @property
    def claim(self) -> Claim:
        return self.instance.promise()

    @cached_property
    def text(self) -> str:
        """The pass with its options, as pipeline text."""
        return pass_text(self.instance)

    @property
    def target(self) -> str:
        """The operation in words: `builtin.module` or `func.func @main`."""
        name = self.op.attributes.get("sym_name")
        return f"{self.op.name} @{name}" if name else self.op.name


class PassObserver(Protocol):
    """What the pass manager calls around each pass; the ledger is one. What it raises ends the run."""

    def before_pass(self, execution: PassExecution) -> None:
        """Called before the pass runs."""

    def after_pass(self, execution: PassExecution) -> None:
        """Called when the pass has run and its result has been verified."""


class Instrument:
    """A `PassObserver` that does nothing, and hears of failures too; subclass what you need."""

    def before_pass(self, execution: PassExecution) -> None:
        """Called before the pass runs."""

    def after_pass(self, execution: PassExecution) -> None:
        """Called when the pass has run and its result has been verified."""

    def after_failure(self, execution: PassExecution, error: Exception) -> None:
        """Called when the pass raised, or left invalid IR; the IR may be half changed."""


@dataclass
class IRPrinting(Instrument):
    """Prints the module before or after passes, as mlir-opt does.

    `before` and `after` name passes (`"*"` for all); `only_changed` skips passes that left the text as it was;
    `locations` adds `loc(...)`.
    """

    write: Write
    before: frozenset[str] = frozenset()
    after: frozenset[str] = frozenset()
    only_changed: bool = False
    locations: bool = False
    _fingerprint: str = field(default="", init=False)

    def before_pass(self, execution: PassExecution) -> None:
        if _named(execution, self.before):
            self._print("Before", execution, execution.op)
        if self.only_changed:
            self._fingerprint = fingerprint(execution.op)

    def after_pass(self, execution: PassExecution) -> None:
        if self.only_changed:
            if fingerprint(execution.op) != self._fingerprint:
                self._print("After", execution, execution.op)
        elif _named(execution, self.after):
            self._print("After", execution, execution.op)

    def after_failure(self, execution: PassExecution, error: Exception) -> None:
        if self.only_changed or _named(execution, self.after):
            self._print("After", execution, execution.op, " Failed")

    def _print(self, when: str, execution: PassExecution, op: Operation, failed: str = "") -> None:
        text = print_operation(op, locations=self.locations)
        self.write(f"// -----// IR Dump {when} {execution.text}{failed} ({execution.target}) //----- //\n{text}\n")


def _named(execution: PassExecution, names: frozenset[str]) -> bool:
    return "*" in names or execution.pass_name in names


def fingerprint(op: Operation) -> str:
    """A digest of the operation's text."""
    return hashlib.sha256(print_operation(op).encode()).hexdigest()


@dataclass
class Timing(Instrument):
    """Adds up wall-clock time by pass; `report` gives the table of `--time-passes`."""

    started: float = field(default_factory=time.perf_counter)
    runs: list[tuple[str, float]] = field(default_factory=list)

    def after_pass(self, execution: PassExecution) -> None:
        self.runs.append((execution.text, execution.seconds))

    def report(self) -> str:
        """One line per pass: seconds, share of the whole, the pass; then the rest (verifying, printing) and the sum."""
        total = time.perf_counter() - self.started
        rows = [*self.runs, ("(verifier and instruments)", total - sum(seconds for _, seconds in self.runs))]
        lines = ["===--- Pass execution timing (wall clock) ---==="]
        for name, seconds in [*rows, ("total", total)]:
            lines.append(f"{seconds:10.4f} s ({100 * seconds / total if total else 0:5.1f}%)  {name}")
        return "\n".join(lines)
