"""The `moec` command: registers the subcommands, and turns what they raise into one paragraph and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from moec import __version__, interruption
from moec.cli.bench import bench
from moec.cli.compile import compile_command
from moec.cli.eval import evaluate
from moec.cli.inspect import inspect
from moec.cli.kernels import kernels
from moec.cli.opt import opt
from moec.cli.passes import passes
from moec.cli.plan import plan
from moec.cli.run import run
from moec.cli.verify import verify
from moec.errors import MoecError

EXIT_FAILED = 1
EXIT_RESOURCES = 5
EXIT_INTERRUPTED = 130

_EXHAUSTED = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than the system allows",
    errno.ENOMEM: "the machine has no memory left",
    errno.EMFILE: "too many files are open in this process",
    errno.ENFILE: "too many files are open on this machine",
}

app = typer.Typer(
    name="moec",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "Exit codes: 0 done, 2 usage, 3 unsupported model, 4 verification failed, 5 out of resources, "
        "6 unsafe input, 130 interrupted."
    ),
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moec {__version__}")
        raise typer.Exit


@app.callback()
def moec(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere in the line.")] = False,
) -> None:
    """Compiles dense and Mixture-of-Experts models through an MLIR-style IR into verified artifacts."""
    del version, debug  # the first is read by its callback, the second by main(), at any place of the command line


app.command("compile")(compile_command)
app.command()(plan)
app.command()(opt)
app.command()(inspect)
app.command()(verify)
app.command("eval")(evaluate)
app.command()(run)
app.command()(bench)
app.command()(kernels)
app.command()(passes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line `arguments` (by default the process's own) and exits with its exit code."""
    line = list(sys.argv[1:] if arguments is None else arguments)
    options = line[: line.index("--")] if "--" in line else line
    debug = "--debug" in options
    line = [word for word in options if word != "--debug"] + line[len(options) :]
    if not debug:
        # torch warns its own developers from deep inside an export; users can do nothing about it.
        warnings.simplefilter("ignore", FutureWarning)
    with interruption.watched():
        try:
            code = _run(line, debug)
            sys.stdout.flush()
        except KeyboardInterrupt:
            code = _interrupted()
        except BrokenPipeError:
            # The parser handles a reader that went away earlier in the same way. Python flushes once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = EXIT_FAILED
    sys.exit(code)


def _run(line: list[str], debug: bool) -> int:
    try:
        result = app(args=line, prog_name="moec", standalone_mode=False)
    except Exception as error:
        # Code between may have made another exception of the one that an interrupt raised.
        return _interrupted() if interruption.requested() else _explain(error, debug)
    if result == EXIT_INTERRUPTED or interruption.requested():  # the first is what typer makes of a KeyboardInterrupt
        return _interrupted()
    return result if isinstance(result, int) else 0


def _interrupted() -> int:
    print("moec: interrupted; nothing half-written was left", file=sys.stderr)
    return EXIT_INTERRUPTED


def _explain(error: Exception, debug: bool) -> int:
    """Prints what went wrong, inside the handler of `error`; returns the exit code."""
    if isinstance(error, MoecError):
        return _report(f"error: {error}", error.exit_code, debug)
    if isinstance(error, MemoryError):
        return _report(
            f"error: the machine has no memory left ({error or 'allocation failed'}).", EXIT_RESOURCES, debug
        )
    if isinstance(error, OSError):
        cause = _EXHAUSTED.get(error.errno or 0)
        if cause is None:
            return _report(f"error: {error}.", EXIT_FAILED, debug)
        where = f" Where: {error.filename}." if error.filename else ""
        return _report(f"error: {cause}.{where}", EXIT_RESOURCES, debug)
    # The command-line parser's own errors print themselves; its classes are private to typer.
    show = getattr(error, "show", None)
    if callable(show):
        show()
        return int(getattr(error, "exit_code", EXIT_FAILED))
    if "DefaultCPUAllocator" in str(error):
        return _report("error: the machine has no memory left for a tensor.", EXIT_RESOURCES, debug)
    name = type(error).__name__
    hint = "" if debug else " This is a defect of moec or of a plug-in; --debug shows the traceback."
    return _report(f"error: {name}: {error}.{hint}", EXIT_FAILED, debug)


def _report(text: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"moec: {text}", file=sys.stderr)
    return code
