"""One artifact of the demo model for all tests of the commands: compiling it takes a while."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moec.cli import main as command_line

EXAMPLES = Path(__file__).parents[2] / "examples"
DEMO_MODEL = EXAMPLES / "models" / "tiny-moe"
HELDOUT = EXAMPLES / "data" / "kjv.heldout.txt"

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def moec(capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs the command line in this process: (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            command_line.main([str(argument) for argument in arguments])
        printed = capfd.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model compiled with the default options. Tests that change it take a copy."""
    import moec

    source = tmp_path_factory.mktemp("source") / "tiny-moe"
    shutil.copytree(DEMO_MODEL, source)
    out = tmp_path_factory.mktemp("artifact") / "out"
    moec.compile(source, out)
    return out


@pytest.fixture
def artifact(compiled: Path, tmp_path: Path) -> Path:
    """A copy of the compiled demo model that a test may damage."""
    copy = tmp_path / "artifact"
    shutil.copytree(compiled, copy)
    return copy


@pytest.fixture
def moec_command(moec: Command) -> Command:
    """`moec`, for tests that import the package of this name."""
    return moec
