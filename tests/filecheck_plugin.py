"""Collects `*.mlir` files: each `// RUN:` line pipes `moec ...`, in process, into FileCheck.

    // RUN: moec opt %s -p cse | filecheck %s --check-prefix=CSE
    // RUN: not moec opt %s -p unknown 2>&1 | filecheck %s

`not` expects a failure, `2>&1` adds standard error to the output. Without a pipe only the exit code is looked at.
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from filecheck.finput import FInput
from filecheck.matcher import Matcher
from filecheck.options import Options
from filecheck.parser import Parser

CHECK_OPTIONS = {"--check-prefix": "check_prefixes", "--check-prefixes": "check_prefixes"}


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path.suffix != ".mlir" or "RUN:" not in file_path.read_text(encoding="utf-8"):
        return None
    return CheckFile.from_parent(parent, path=file_path)


class CheckFile(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            if line.startswith("// RUN:"):
                command = line.removeprefix("// RUN:").strip()
                yield CheckItem.from_parent(self, name=f"line{number}", command=command)


class CheckItem(pytest.Item):
    def __init__(self, *, command: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.command = command

    def runtest(self) -> None:
        tool, _, check = self.command.replace("%s", shlex.quote(str(self.path))).partition("|")
        code, output = run_moec(shlex.split(tool))
        fails = tool.split()[0] == "not"
        if (code != 0) != fails:
            raise AssertionError(f"exit code {code}\n{output}")
        if check:
            match_output(self.path, output, shlex.split(check)[1:])

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        return str(excinfo.value) if excinfo.errisinstance(AssertionError) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{self.path.name}: {self.command}"


def run_moec(words: list[str]) -> tuple[int, str]:
    """(exit code, output) of `[not] moec ARGUMENTS... [2>&1]`."""
    from moec.cli.main import main

    merge = "2>&1" in words
    arguments = [word for word in words if word not in ("not", "2>&1")]
    assert arguments[0] == "moec", f"RUN lines start with moec, not {arguments[0]}"
    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(output if merge else errors):
        try:
            main(arguments[1:])
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, output.getvalue() + ("" if merge or code == 0 else errors.getvalue())


def match_output(path: Path, output: str, arguments: list[str]) -> None:
    """Raises AssertionError where `output` does not match the CHECK lines of the file."""
    given = dict(word.split("=", 1) for word in arguments if word.startswith("--"))
    options = Options(str(path), **{CHECK_OPTIONS[key]: value for key, value in given.items()})  # type: ignore[arg-type]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as log:
        code = Matcher(options, FInput("<output>", output), Parser.from_opts(options)).run()
    if code:
        raise AssertionError(f"{log.getvalue()}\n{output}")
