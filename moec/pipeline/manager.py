"""Runs pipelines: pass after pass, verified, watched by instruments, with a reproducer where one fails."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moec import interruption
from moec.errors import MoecError, VerificationError
from moec.ir.operation import Operation
from moec.ir.printer import print_operation
from moec.ir.verifier import VerifyError, verify
from moec.pipeline.base import Pass, PassContext, Remark
from moec.pipeline.instruments import Instrument, PassExecution, PassObserver
from moec.pipeline.options import build_pass, pass_text
from moec.pipeline.registry import BUILTIN, find_entry
from moec.pipeline.reproducer import Reproducer, installed_versions, write_reproducer
from moec.pipeline.spec import NestedSpec, PipelineError, PipelineItem, parse_pipeline_text
from moec.rewrite.pattern import Refusal

if TYPE_CHECKING:
    from moec.module import Module
    from moec.weights.context import WeightContext

MODULE = "builtin.module"


class PassFailedError(MoecError):
    """A pass raised something that is no report to people: a defect of that pass."""


class InvalidResultError(VerificationError):
    """A pass left IR that does not verify."""


@dataclass(frozen=True)
class PipelinePass:
    """A pass at its place: its instance, what it runs on, and the distribution that it comes from.

    `qualified`: the distribution is part of the text, because it was in the text that was read.
    """

    instance: Pass
    anchor: str = MODULE
    distribution: str = BUILTIN
    qualified: bool = False

    def __str__(self) -> str:
        text = pass_text(self.instance)
        if self.qualified:
            text = f"{self.distribution}:{text}"
        return text if self.anchor == MODULE else f"{self.anchor}({text})"

    @property
    def description(self) -> str:
        """`pass x`, with its distribution where it is not built in."""
        origin = "" if self.distribution == BUILTIN else f" of the distribution {self.distribution}"
        return f"pass {self.instance.pass_name}{origin}"


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. `Pipeline.parse("canonicalize,cse")` reads pipeline text; `str()` gives it back."""

    passes: tuple[PipelinePass, ...] = ()

    @staticmethod
    def parse(text: str) -> Pipeline:
        """Raises PipelineError for malformed text or an unknown pass or option, PluginError for a broken plug-in."""
        return Pipeline(tuple(_build(parse_pipeline_text(text), MODULE)))

    @staticmethod
    def of(*instances: Pass) -> Pipeline:
        """A pipeline of pass objects, on the module or on each function as each pass asks."""
        return Pipeline(tuple(PipelinePass(instance, instance.anchor or MODULE) for instance in instances))

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))


def _build(items: Sequence[PipelineItem], anchor: str) -> list[PipelinePass]:
    found: list[PipelinePass] = []
    for item in items:
        if isinstance(item, NestedSpec):
            found += _build(item.items, item.anchor)
            continue
        entry = find_entry(item.name)
        instance = build_pass(entry.load(), item)
        wanted = instance.anchor
        if wanted == MODULE and anchor != MODULE:
            raise PipelineError(
                f"pass {item.name} runs on the whole module, not on {anchor}", hint=f"write it outside {anchor}(...)"
            )
        found.append(PipelinePass(instance, wanted or anchor, entry.distribution, ":" in item.name))
    return found


@dataclass(frozen=True)
class PassRecord:
    """What one run of a pass left: its text, claim, time and findings."""

    text: str
    target: str
    claim: str
    seconds: float
    statistics: dict[str, int]
    refusals: tuple[Refusal, ...]
    remarks: tuple[Remark, ...]
    warnings: tuple[Remark, ...] = ()


@dataclass
class PipelineReport:
    """The records of all passes that ran, in order."""

    records: list[PassRecord] = field(default_factory=list)

    def statistics_text(self) -> str:
        """The table of `--pass-statistics`."""
        lines = ["===--- Pass statistics report ---==="]
        for record in self.records:
            lines.append(f"{record.text} ({record.target})")
            lines += [f"  {number:8d}  {name}" for name, number in sorted(record.statistics.items())]
        return "\n".join(lines)

    def explanation_text(self) -> str:
        """The refusals and remarks of `--explain`, pass by pass."""
        lines = []
        for record in self.records:
            lines += [f"{record.text}: {note}" for note in (*record.refusals, *record.remarks)]
        return "\n".join(lines)

    def warnings(self) -> tuple[str, ...]:
        """What makes the result worse than it could be: each text once, with the first place that it is about."""
        found = []
        for record in self.records:
            places: dict[str, list[Remark]] = {}
            for warning in record.warnings:
                places.setdefault(warning.text, []).append(warning)
            for text, same in places.items():
                more = f" and {len(same) - 1} more" if len(same) > 1 else ""
                found.append(f"{record.text}: {text} ({same[0].location.name or same[0].operation}{more})")
        return tuple(found)


@dataclass
class PassManager:
    """Runs a pipeline on a module.

    `verify_each` verifies before the first and after each pass. `observers` are called around each pass (instruments,
    the ledger). `reproducer` is the file that a failure writes (None: no file).
    """

    pipeline: Pipeline
    verify_each: bool = True
    observers: Sequence[PassObserver] = ()
    reproducer: Path | None = None

    def run(
        self,
        root: Operation,
        *,
        weights: WeightContext | None = None,
        module: Module | None = None,
        seed: int = 0,
        calibration_file: Path | None = None,
    ) -> PipelineReport:
        """Transforms `root`, a `builtin.module`, in place.

        `calibration_file` is what `calibrate` reads where it names nothing.

        Raises:
            VerifyError: the input is invalid. InvalidResultError: a pass left invalid IR. PassFailedError: a pass
            has a defect. MoecError: a pass refused the input; the error names it.
        """
        if self.verify_each:
            verify(root)
        report = PipelineReport()
        index = 0
        for step in self.pipeline.passes:
            for op in _targets(root, step.anchor):
                interruption.heed()
                context = PassContext(weights, module, seed, calibration_file)
                context.statistics = {statistic.name: 0 for statistic in step.instance.statistic_list()}
                execution = PassExecution(step.instance, root, op, context, index)
                before = print_operation(root, locations=True) if self.reproducer is not None else ""
                self._run_one(step, execution, before)
                index += 1
                report.records.append(
                    PassRecord(
                        execution.text,
                        execution.target,
                        execution.claim.value,
                        execution.seconds,
                        context.statistics,
                        tuple(context.refusals),
                        tuple(context.remarks),
                        tuple(context.warnings),
                    )
                )
        return report

    def _run_one(self, step: PipelinePass, execution: PassExecution, before: str) -> None:
        for observer in self.observers:
            observer.before_pass(execution)
        started = time.perf_counter()
        try:
            step.instance.run(execution.op, execution.context)
            execution.seconds = time.perf_counter() - started
            if self.verify_each:
                verify(execution.root)
        except Exception as error:  # any defect of a pass is reported with the pass's name
            failure = _explain(step, execution, error)
            for observer in self.observers:
                if isinstance(observer, Instrument):
                    observer.after_failure(execution, error)
            if self.reproducer is not None:
                self._write_reproducer(step, execution, before, failure)
                failure.hint = f"{failure.hint}; " if failure.hint else ""
                failure.hint += f"run it again with `moec opt --run-reproducer {self.reproducer}`"
            raise failure from error
        for observer in self.observers:
            observer.after_pass(execution)

    def _write_reproducer(self, step: PipelinePass, execution: PassExecution, before: str, failure: MoecError) -> None:
        assert self.reproducer is not None
        versions = installed_versions([step.distribution])
        header = Reproducer(str(step), execution.context.seed, self.verify_each, str(failure.message), versions)
        write_reproducer(self.reproducer, header, before)


def _targets(root: Operation, anchor: str) -> list[Operation]:
    if root.name == anchor:
        return [root]
    return [op for region in root.regions for op in region.block if op.name == anchor]


def _explain(step: PipelinePass, execution: PassExecution, error: Exception) -> MoecError:
    """The error that names the pass; a new object, because the pass may keep the old one."""
    where = f"on {execution.target}"
    if isinstance(error, VerifyError):
        return InvalidResultError(
            f"{step.description} leaves invalid IR: {error.message}", where=f"{where}, {error.where}"
        )
    if isinstance(error, MoecError):
        named = type(error).__new__(type(error))
        named.__dict__.update(error.__dict__)
        MoecError.__init__(named, f"{step.description}: {error.message}", where=error.where or where, hint=error.hint)
        return named
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    place = f", {Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno}" if last is not None else ""
    return PassFailedError(
        f"{step.description} failed with {type(error).__name__}: {error}",
        where=where + place,
        hint="--debug shows the traceback",
    )
