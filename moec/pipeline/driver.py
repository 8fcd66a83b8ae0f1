"""What `moec opt` does: text of IR in, passes, text of IR out."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import moec.dialects  # noqa: F401  (registers the operations)
from moec.errors import UsageError
from moec.ir.operation import Operation
from moec.ir.parser import parse_module
from moec.ir.printer import print_operation
from moec.ir.verifier import verify
from moec.pipeline.diagnostics import check_diagnostics
from moec.pipeline.instruments import IRPrinting, PassObserver, Timing
from moec.pipeline.manager import PassManager, Pipeline
from moec.pipeline.registry import clashes, load_plugin
from moec.pipeline.reproducer import read_reproducer

if TYPE_CHECKING:
    from moec.module import Module

SPLIT = re.compile(r"^// -----[ \t]*$", re.MULTILINE)
Report = Callable[[str], None]


@dataclass(frozen=True)
class OptOptions:
    """The options of `moec opt`; `show` makes the text of the result."""

    pipeline: str = ""
    split_input: bool = False
    verify_diagnostics: bool = False
    verify_each: bool = True
    show: Callable[[Operation], str] = print_operation
    locations: bool = False
    print_before: frozenset[str] = frozenset()
    print_after: frozenset[str] = frozenset()
    print_after_change: bool = False
    timing: bool = False
    statistics: bool = False
    explain: bool = False
    seed: int = 0
    source: Path | None = None
    crash_reproducer: Path | None = None
    run_reproducer: bool = False
    plugins: tuple[str, ...] = ()


def read_text(file: str) -> tuple[str, str]:
    """(name for messages, text) of a file, or of standard input for `-`; raises UsageError."""
    if file == "-":
        return "<stdin>", sys.stdin.read()
    path = Path(file)
    try:
        return file, path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError("there is no such file", where=file) from None
    except IsADirectoryError:
        raise UsageError("this is a folder, not a file of IR", where=file) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"the file is not UTF-8 text ({error.reason} at byte {error.start})", where=file) from None


def write_text(file: str, text: str) -> None:
    """Prints for `-`, else writes the whole file or nothing."""
    if file == "-":
        print(text)
        return
    path = Path(file)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_text(f"{text}\n", encoding="utf-8")
        unfinished.replace(path)
    except FileNotFoundError:
        raise UsageError("there is no such folder", where=str(path.parent)) from None
    finally:
        unfinished.unlink(missing_ok=True)


def run_text(text: str, file: str, options: OptOptions, report: Report) -> str:
    """Runs the pipeline on each piece of `text`; `report` gets what is measured or explained.

    Raises:
        ParseError, VerifyError: the text is malformed. Others as `PassManager.run`.
    """
    if options.run_reproducer:
        found = read_reproducer(text, file)
        options = replace(options, pipeline=found.pipeline, seed=found.seed, verify_each=found.verify_each)
    for plugin in options.plugins:
        load_plugin(plugin)
    pipeline = Pipeline.parse(options.pipeline)
    used = {step.instance.pass_name for step in pipeline.passes}
    for clash in clashes():
        if clash.name in used:
            report(f"note: {clash}")
    model = _load(options.source)
    results = []
    for piece, first_line in _pieces(text, options.split_input):
        run = partial(_run, piece, file, first_line, pipeline, options, model, report)
        if options.verify_diagnostics:
            check_diagnostics(piece, file, first_line, run)
        else:
            results.append(run())
    return "\n// -----\n".join(results)


def _pieces(text: str, split: bool) -> Iterator[tuple[str, int]]:
    """(piece, number of lines before it)."""
    start = 0
    for mark in SPLIT.finditer(text) if split else ():
        yield text[start : mark.start()], text.count("\n", 0, start)
        start = mark.end()
    yield text[start:], text.count("\n", 0, start)


def _run(
    text: str, file: str, first_line: int, pipeline: Pipeline, options: OptOptions, model: Module | None, report: Report
) -> str:
    # blank lines keep the line numbers of the whole file
    root = parse_module("\n" * first_line + text, file)
    if options.verify_each:
        verify(root)
    timing = Timing()
    observers: list[PassObserver] = [
        IRPrinting(report, options.print_before, options.print_after, options.print_after_change, options.locations)
    ]
    if options.timing:
        observers.append(timing)
    manager = PassManager(pipeline, options.verify_each, observers, options.crash_reproducer)
    module = _with_root(model, root) if model is not None else None
    weights = model.weights if model is not None else None
    record = manager.run(root, weights=weights, module=module, seed=options.seed)
    if options.explain:
        report(record.explanation_text() or "nothing was refused")
    if options.statistics:
        report(record.statistics_text())
    if options.timing:
        report(timing.report())
    return options.show(root)


def _with_root(model: Module, root: Operation) -> Module:
    """The source's weights and facts around the IR that was read."""
    from moec.dialects.builtin import ModuleOp
    from moec.module import Module

    if not isinstance(root, ModuleOp):
        raise UsageError(f"with --source the text must be a builtin.module, not {root.name}")
    return Module(root, model.weights, model.source)


def _load(source: Path | None) -> Module | None:
    if source is None:
        return None
    from moec.artifact.options import default_store
    from moec.frontend.huggingface import load_huggingface
    from moec.weights.store import WeightStore

    return load_huggingface(source, WeightStore(default_store()))
