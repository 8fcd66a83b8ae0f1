"""The frame of the command line: cheap help, one paragraph per error, the documented exit codes."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from moec.cli import main as command_line
from moec.errors import ResourceError, UnsafeInputError, UnsupportedModelError, UsageError, VerificationError


def run_moec(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "moec", *arguments], capture_output=True, text=True, check=False)


def test_help_is_cheap() -> None:
    code = (
        "import sys\n"
        "from moec.cli.main import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'transformers', 'onnx_ir', 'numpy', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run_moec("--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_help_lists_exit_codes() -> None:
    text = " ".join(run_moec("--help").stdout.split())
    assert "4 verification failed" in text
    assert "130 interrupted" in text


def test_version() -> None:
    done = run_moec("--version")
    assert (done.returncode, done.stdout) == (0, "moec 0.1.0\n")


@pytest.mark.parametrize("arguments", [["compil"], ["--no-such-option"], []])
def test_usage_errors(arguments: list[str]) -> None:
    assert run_moec(*arguments).returncode == 2


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UsageError("no such file", where="x.mlir", hint="give a file"), 2, "no such file. Where: x.mlir."),
        (UnsupportedModelError("what is this"), 3, "what is this"),
        (VerificationError("differs"), 4, "differs"),
        (ResourceError("too large"), 5, "too large"),
        (UnsafeInputError("cut file"), 6, "cut file"),
        (MemoryError(), 5, "no memory left"),
        (OSError(28, "No space left on device", "out/model.onnx"), 5, "the disk is full. Where: out/model.onnx."),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            5,
            "no memory",
        ),
        (FileNotFoundError(2, "No such file or directory", "a"), 1, "No such file or directory: 'a'"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("bug"), 1, "ValueError: bug. This is a defect"),
    ],
)
def test_every_error_is_one_line_and_one_exit_code(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr(command_line, "app", app)
    with pytest.raises(SystemExit) as end:
        command_line.main([])
    assert end.value.code == code
    printed = capsys.readouterr().err
    assert text in printed
    assert "Traceback" not in printed
    assert len(printed.strip().splitlines()) == 1
    with pytest.raises(SystemExit):
        command_line.main(["--debug"])
    assert ("Traceback" in capsys.readouterr().err) == (code != 130)


def test_closed_pipe_is_silent(tmp_path: Path) -> None:
    script = tmp_path / "loud.py"
    script.write_text(
        "import typer\n"
        "from moec.cli import main as command_line\n"
        "app = typer.Typer()\n"
        "@app.command()\n"
        "def loud() -> None:\n"
        "    for _ in range(100000):\n"
        "        print('line')\n"
        "command_line.app = app\n"
        "command_line.main([])\n"
    )
    piped = f"{sys.executable} {script} | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {piped}"], capture_output=True, text=True, check=False)
    assert done.stdout == "line\n"
    assert done.stderr == ""
    assert done.returncode == 1


def test_terminate_runs_the_same_clean_up_as_an_interrupt(tmp_path: Path) -> None:
    script = tmp_path / "wait.py"
    script.write_text(
        "import sys, typer\n"
        "from pathlib import Path\n"
        "from moec.artifact.folder import atomic_folder\n"
        "from moec.cli import main as command_line\n"
        "app = typer.Typer()\n"
        "@app.command()\n"
        "def wait() -> None:\n"
        f"    with atomic_folder(Path({str(tmp_path / 'out')!r})):\n"
        "        print('ready', flush=True)\n"
        "        sys.stdin.read()\n"
        "command_line.app = app\n"
        "command_line.main([])\n"
    )
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.wait(10) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["wait.py"]
