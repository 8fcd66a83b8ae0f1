"""`moec opt`: IR in, IR out, with mlir-opt's habits and flag names."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moec.cli.common import PluginsOption
from moec.errors import UsageError


def opt(
    file: Annotated[str, typer.Argument(metavar="FILE", help="IR text; - reads standard input.")] = "-",
    pipeline: Annotated[
        str, typer.Option("--pass-pipeline", "-p", help="Passes, as `a,b{option=value},func.func(c)`.")
    ] = "",
    output: Annotated[str, typer.Option("-o", metavar="FILE", help="Where to write the IR; - prints it.")] = "-",
    split_input_file: Annotated[
        bool, typer.Option("--split-input-file", help="Process the pieces between `// -----` lines on their own.")
    ] = False,
    verify_diagnostics: Annotated[
        bool,
        typer.Option("--verify-diagnostics", help="Compare errors with `// expected-error {{text}}` comments."),
    ] = False,
    verify_each: Annotated[
        bool, typer.Option("--verify-each/--no-verify-each", help="Verify the input and the result of each pass.")
    ] = True,
    pretty: Annotated[
        bool, typer.Option("--pretty", help="Print the form for people; it cannot be read back.")
    ] = False,
    print_locations: Annotated[
        bool, typer.Option("--mlir-print-debuginfo", help="Print the location of each operation.")
    ] = False,
    print_before: Annotated[
        list[str] | None,
        typer.Option("--print-ir-before", "--mlir-print-ir-before", metavar="PASS", help="Print before this pass."),
    ] = None,
    print_after: Annotated[
        list[str] | None,
        typer.Option("--print-ir-after", "--mlir-print-ir-after", metavar="PASS", help="Print after this pass."),
    ] = None,
    print_before_all: Annotated[
        bool, typer.Option("--print-ir-before-all", "--mlir-print-ir-before-all", help="Print before each pass.")
    ] = False,
    print_after_all: Annotated[
        bool, typer.Option("--print-ir-after-all", "--mlir-print-ir-after-all", help="Print after each pass.")
    ] = False,
    print_after_change: Annotated[
        bool,
        typer.Option(
            "--print-ir-after-change", "--mlir-print-ir-after-change", help="Print after passes that changed the IR."
        ),
    ] = False,
    timing: Annotated[
        bool, typer.Option("--time-passes", "--mlir-timing", help="Print the time of each pass.")
    ] = False,
    statistics: Annotated[
        bool, typer.Option("--pass-statistics", "--mlir-pass-statistics", help="Print what each pass counted.")
    ] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Print what passes refused to change, and why.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Makes random choices of passes repeatable.")] = 0,
    source: Annotated[
        Path | None, typer.Option("--source", metavar="FOLDER", help="Model folder for passes that read weights.")
    ] = None,
    plugins: PluginsOption = None,
    crash_reproducer: Annotated[
        Path | None,
        typer.Option(
            "--crash-reproducer",
            "--mlir-pass-pipeline-crash-reproducer",
            metavar="FILE",
            help="Where a pass that fails leaves its input and the command.",
        ),
    ] = None,
    run_reproducer: Annotated[
        bool, typer.Option("--run-reproducer", help="FILE is a reproducer: run the pipeline that it names.")
    ] = False,
) -> None:
    """Reads IR text, runs passes on it and prints the result; what is measured or explained goes to standard error."""
    from moec.ir.pretty import print_pretty
    from moec.ir.printer import print_operation
    from moec.pipeline.driver import OptOptions, read_text, run_text, write_text

    if run_reproducer and pipeline:
        raise UsageError("--run-reproducer takes the pipeline from the file", hint="leave out -p")
    options = OptOptions(
        pipeline=pipeline,
        split_input=split_input_file,
        verify_diagnostics=verify_diagnostics,
        verify_each=verify_each,
        show=print_pretty if pretty else lambda op: print_operation(op, locations=print_locations),
        locations=print_locations,
        print_before=frozenset({*(print_before or ()), *(["*"] if print_before_all else [])}),
        print_after=frozenset({*(print_after or ()), *(["*"] if print_after_all else [])}),
        print_after_change=print_after_change,
        timing=timing,
        statistics=statistics,
        explain=explain,
        seed=seed,
        source=source,
        crash_reproducer=crash_reproducer,
        run_reproducer=run_reproducer,
        plugins=tuple(plugins or ()),
    )
    name, text = read_text(file)
    result = run_text(text, name, options, lambda message: print(message, file=sys.stderr))
    if not verify_diagnostics:
        write_text(output, result)
