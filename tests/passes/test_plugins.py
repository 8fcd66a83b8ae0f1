"""Passes of other packages: installed, clashing, broken; each problem is reported by name with its exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moec.pipeline import Pipeline, PipelineError, PluginError, clashes, find_pass, pass_entries, registry
from tests.filecheck_plugin import run_moec
from tests.passes.plugins import install, pass_source

ROOT = Path(__file__).parents[2]
BLOCK = """"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4xf32>):
    %a = "aten.gelu.default"(%x) <{operand_layout = ["self"]}> : (tensor<4xf32>) -> tensor<4xf32> loc("layers.0")
    %b = "aten.gelu.default"(%a) <{operand_layout = ["self"]}> : (tensor<4xf32>) -> tensor<4xf32> loc("layers.1")
    "func.return"(%b) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
"""


@pytest.fixture(autouse=True)
def forget_plugins() -> Iterator[None]:
    """A module that was imported by an earlier test counts as one of the running program's."""
    yield
    for module in ("acme_passes", "other_passes"):
        sys.modules.pop(module, None)
        for key in [key for key in registry._classes if key[0] == module]:
            del registry._classes[key]


@pytest.fixture
def block(tmp_path: Path) -> str:
    file = tmp_path / "block.mlir"
    file.write_text(BLOCK, encoding="utf-8")
    return str(file)


def opt(*arguments: str) -> tuple[int, str]:
    return run_moec(["moec", "opt", *arguments, "2>&1"])


def test_the_example_package_installs_and_runs(tmp_path: Path, block: str) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "examples" / "custom_pass", source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--disable-pip-version-check", "--target", str(site), str(source)], check=True, timeout=120)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}

    def moec(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moec", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)

    shown = moec("passes", "fast-gelu")
    assert shown.returncode == 0, shown.stderr
    assert "From: moec-fast-gelu." in shown.stdout and "Claims: lossy" in shown.stdout
    assert "scope=<str>  only operations whose location contains this text" in shown.stdout
    listed = json.loads(moec("passes", "--json").stdout)
    assert ("fast-gelu", "moec-fast-gelu") in {(entry["name"], entry["distribution"]) for entry in listed}

    flags = ["--pass-statistics", "--time-passes", "--explain"]
    result = moec("opt", block, "-p", "func.func(fast-gelu{scope=layers.0}),cse", *flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('approximate = "tanh"') == 1
    assert "1  replaced" in result.stderr and "fast-gelu{scope=layers.0}" in result.stderr
    assert "layers.1: approximate refused aten.gelu.default: it is not in layers.0" in result.stderr
    result = moec("opt", block, "-p", "fast-gelu{scop=layers.0}")
    assert result.returncode == 2 and "did you mean 'scope'?" in result.stderr


def test_a_plugin_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "acme-passes", "raise ImportError('needs acme-runtime')", {"acme": "ThePass"})
    assert "acme" in pass_entries()
    Pipeline.parse("canonicalize,cse")
    with pytest.raises(PluginError) as caught:
        find_pass("acme")
    assert caught.value.exit_code == 2
    assert "pass acme of the distribution acme-passes fails on import: ImportError: needs acme-runtime" in str(
        caught.value
    )


def test_passes_lists_the_others_where_one_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "acme-passes", "1 / 0", {"acme": "ThePass"})
    code, output = run_moec(["moec", "passes", "2>&1"])
    assert code == 0
    assert "canonicalize" in output and "acme-passes fails on import: ZeroDivisionError" in output


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("value = 3", "value", "is no pass: 3"),
        ("value = 3", "missing", "fails on import: AttributeError"),
        (pass_source("other", "pass"), "ThePass", "registers 'other'"),
        ("class ThePass(Pass):\n    pass", "ThePass", "registers 'no name'"),
    ],
)
def test_entry_points_that_are_no_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, target: str, message: str
) -> None:
    install(tmp_path, monkeypatch, "acme-passes", source, {"acme": target})
    with pytest.raises(PluginError) as caught:
        find_pass("acme")
    assert message in caught.value.message and "acme-passes" in caught.value.message


def test_a_built_in_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: str) -> None:
    source = pass_source("cse", "context.remark(op, 'acme was here')")
    install(tmp_path, monkeypatch, "acme-passes", source, {"cse": "ThePass"})
    [clash] = clashes()
    assert str(clash) == (
        "pass cse is offered by moec and acme-passes; the built-in one is used; write acme-passes:cse for the other"
    )
    assert find_pass("cse").__module__ == "moec.passes.cse"
    assert find_pass("acme-passes:cse").__module__ == "acme_passes"
    assert str(Pipeline.parse("acme-passes:cse,cse")) == "acme-passes:cse,cse"
    code, output = opt(block, "-p", "cse", "--explain")
    assert code == 0 and "note: pass cse is offered by moec and acme-passes" in output
    assert "acme was here" not in output
    code, output = opt(block, "-p", "acme-passes:cse", "--explain")
    assert code == 0 and "acme was here" in output


def test_two_plugins_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "acme-passes", pass_source("shine", "pass"), {"shine": "ThePass"})
    install(tmp_path, monkeypatch, "other-passes", pass_source("shine", "pass"), {"shine": "ThePass"})
    with pytest.raises(PipelineError) as caught:
        find_pass("shine")
    assert "acme-passes and other-passes; choose by acme-passes:shine, other-passes:shine" in str(caught.value)
    assert find_pass("other-passes:shine").__module__ == "other_passes"
    with pytest.raises(PipelineError, match="no pass 'third:shine'"):
        find_pass("third:shine")


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("raise KeyError('gate')", 1, "failed with KeyError: 'gate'. Where: on builtin.module, acme_passes.py:"),
        (
            "list(op.walk())[-1].set_operands([])",
            4,
            "leaves invalid IR: the function main is (tensor<4xf32>) -> (), but declares",
        ),
        (
            "body = op.main.body; first = body.first; first.detach(); first.insert_before(body.terminator)",
            4,
            "leaves invalid IR: operand 0 of aten.gelu.default does not dominate this use",
        ),
        ("context.require_weights()", 1, "this pass reads weights, but the IR was given as text alone"),
    ],
)
def test_failures_name_the_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: str, body: str, code: int, message: str
) -> None:
    install(tmp_path, monkeypatch, "acme-passes", pass_source("shine", body), {"shine": "ThePass"})
    out, crash = tmp_path / "out.mlir", tmp_path / "crash.mlir"
    found, output = opt(block, "-p", "cse,shine", "-o", str(out), "--crash-reproducer", str(crash))
    assert found == code, output
    assert "pass shine of the distribution acme-passes" in output and message in output
    assert "Traceback" not in output and not out.exists()
    header = crash.read_text(encoding="utf-8").partition('"builtin.module"')[0]
    assert "//   pipeline: shine\n" in header and "acme-passes 1.0" in header
    again, output = opt(str(crash), "--run-reproducer")
    assert again == code and message.partition(" Where")[0] in output
