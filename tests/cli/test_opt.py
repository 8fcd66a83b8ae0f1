"""`moec opt` and `moec passes`: flags, files, streams and exit codes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moec.ir import parse_module, print_operation
from tests.filecheck_plugin import run_moec
from tests.ir.build import moe_module
from tests.passes.text import function

CHAIN = """%dead = abs.default(self=%x) -> f32[4]
%a = neg.default(self=%x) -> f32[4]
%b = neg.default(self=%a) -> f32[4]
return %b"""


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    file = tmp_path / "chain.mlir"
    file.write_text(print_operation(function("%x: f32[4]", CHAIN)) + "\n", encoding="utf-8")
    return file


def opt(*arguments: str | Path) -> tuple[int, str]:
    return run_moec(["moec", "opt", *map(str, arguments)])


def streams(*arguments: str | Path) -> tuple[str, str]:
    """Standard output and error of a run that succeeds."""
    _, output = opt(*arguments)
    _, both = opt(*arguments, "2>&1")
    return output, both


def test_without_passes_the_text_comes_back_canonical(chain: Path) -> None:
    code, output = opt(chain)
    assert code == 0 and output == chain.read_text(encoding="utf-8")


def test_standard_input_and_output_file(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(chain.read_text(encoding="utf-8")))
    out = tmp_path / "out.mlir"
    code, output = opt("-", "-p", "canonicalize", "-o", out)
    assert (code, output) == (0, "")
    assert [op.name for op in parse_module(out.read_text(encoding="utf-8")).walk()][2:] == ["func.return"]
    out.write_text("old", encoding="utf-8")
    assert opt(chain, "-o", out)[0] == 0 and out.read_text(encoding="utf-8") == chain.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chain.mlir", "out.mlir"]
    code, output = opt(chain, "-o", tmp_path / "missing" / "out.mlir", "2>&1")
    assert code == 2 and "no such folder" in output


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.mlir", None, "there is no such file"),
        ("folder", "folder", "this is a folder"),
        ("binary.mlir", b"\xff\xfe\x00", "not UTF-8"),
        ("empty.mlir", b"", "the text ends early"),
    ],
)
def test_files_that_are_no_ir(tmp_path: Path, name: str, content: bytes | str | None, message: str) -> None:
    file = tmp_path / name
    if content == "folder":
        file.mkdir()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    code, output = opt(file, "2>&1")
    assert code == 2 and message in output and name in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("canonicalise", "did you mean 'canonicalize'?"),
        ("canonicalize{max-iteration=3}", "did you mean 'max-iterations'?"),
        ("canonicalize{max-iterations=0}", "max-iterations must be at least 1"),
        ("cse,", "expected the name of a pass"),
    ],
)
def test_wrong_pipelines(chain: Path, tmp_path: Path, pipeline: str, message: str) -> None:
    code, output = opt(chain, "-p", pipeline, "-o", tmp_path / "out.mlir", "2>&1")
    assert code == 2 and message in output and not (tmp_path / "out.mlir").exists()


def test_pieces(chain: Path, tmp_path: Path) -> None:
    piece = chain.read_text(encoding="utf-8")
    file = tmp_path / "pieces.mlir"
    file.write_text(f"{piece}// -----\n{piece}// -----\n{piece}", encoding="utf-8")
    code, output = opt(file, "--split-input-file", "-p", "dce")
    assert code == 0 and output.count("// -----") == 2 and output.count("aten.neg.default") == 6
    assert "abs" not in output
    code, output = opt(file, "2>&1")
    assert code == 2 and "after the end of the operation" in output
    lines = piece.count("\n")
    file.write_text(f"{piece}// -----\n{piece.replace('(%arg0) <', '(%nowhere) <', 1)}", encoding="utf-8")
    code, output = opt(file, "--split-input-file", "2>&1")
    assert code == 2 and f"pieces.mlir:{lines + 1 + 4}:" in output and "undefined value %nowhere" in output


@pytest.mark.parametrize(
    ("comment", "code", "message"),
    [
        ("// expected-error @below {{undefined value %y}}", 0, ""),
        ("// expected-error @+1 {{undefined value}}", 0, ""),
        ("// expected-error @unknown {{undefined value}}", 0, ""),
        ("// expected-error {{undefined value}}", 4, "unexpected error: undefined value %y"),
        ("// expected-error @below {{something else}}", 4, "unexpected error: undefined value %y"),
        ("// nothing is expected", 4, "unexpected error: undefined value %y"),
    ],
)
def test_diagnostics(tmp_path: Path, comment: str, code: int, message: str) -> None:
    file = tmp_path / "bad.mlir"
    file.write_text(
        f'"builtin.module"() ({{\n{comment}\n"t.a"(%y) : (tensor<4xf32>) -> ()\n}}) : () -> ()\n', encoding="utf-8"
    )
    found, output = opt(file, "--verify-diagnostics", "2>&1")
    assert found == code and message in output
    file.write_text('"builtin.module"() ({\n// expected-error {{x}}\n}) : () -> ()\n', encoding="utf-8")
    found, output = opt(file, "--verify-diagnostics", "2>&1")
    assert found == 4 and "expected the error 'x', which was not reported" in output


def test_printing_flags(chain: Path) -> None:
    output, both = streams(chain, "-p", "dce,cse,canonicalize", "--print-ir-after-all", "--print-ir-before", "cse")
    dumps = [line for line in both.splitlines() if line.startswith("// -----//")]
    assert [line.split(" (")[0] for line in dumps] == [
        "// -----// IR Dump After dce",
        "// -----// IR Dump Before cse",
        "// -----// IR Dump After cse",
        "// -----// IR Dump After canonicalize",
    ]
    assert "IR Dump" not in output
    _, both = streams(chain, "-p", "dce,cse,canonicalize", "--mlir-print-ir-after-change")
    dumps = [line.split(" (")[0] for line in both.splitlines() if line.startswith("// -----//")]
    assert dumps == ["// -----// IR Dump After dce", "// -----// IR Dump After canonicalize"]


def test_timing_statistics_and_explanations(chain: Path) -> None:
    flags = ["--mlir-timing", "--pass-statistics", "--explain"]
    output, both = streams(chain, "-p", "canonicalize,func.func(dce)", *flags)
    assert output.startswith('"builtin.module"')
    for text in ("(verifier and instruments)", "1  rewritten", "dce (func.func @main)", "nothing was refused"):
        assert text in both and text not in output


def test_locations(tmp_path: Path) -> None:
    module = moe_module()
    first = module.main.body.first
    assert first is not None
    first.location = first.location.__class__(name="router")
    file = tmp_path / "module.mlir"
    file.write_text(print_operation(module, locations=True), encoding="utf-8")
    assert 'loc("router")' in opt(file, "--mlir-print-debuginfo")[1]
    assert "loc(" not in opt(file)[1]


def test_verifier_can_be_left_out(chain: Path) -> None:
    text = chain.read_text(encoding="utf-8").replace('operand_layout = ["self"]', "operand_layout = []", 1)
    chain.write_text(text, encoding="utf-8")
    assert opt(chain)[0] == 2
    assert opt(chain, "--no-verify-each") == (0, text)


def test_reproducer_flags_exclude_each_other(chain: Path) -> None:
    code, output = opt(chain, "-p", "cse", "--run-reproducer", "2>&1")
    assert code == 2 and "takes the pipeline from the file" in output
    code, output = opt(chain, "--run-reproducer", "2>&1")
    assert code == 2 and "no reproducer" in output


@pytest.mark.parametrize("name", ["nowhere.py", "no_such_module_here"])
def test_plugins_that_cannot_be_loaded(chain: Path, name: str) -> None:
    code, output = opt(chain, "--load-pass-plugin", name, "2>&1")
    assert code == 2 and f"the plug-in {name} fails on import" in output


def test_passes() -> None:
    code, output = run_moec(["moec", "passes"])
    assert code == 0 and any(line.split()[:2] == ["cse", "exact"] for line in output.splitlines())
    code, output = run_moec(["moec", "passes", "canonicalize"])
    assert code == 0 and "max-iterations=<int>" in output and "Statistics:" in output
    code, output = run_moec(["moec", "passes", "canonicalize", "--json"])
    found = json.loads(output)
    assert found["options"][0] == {
        "name": "max-iterations",
        "type": "int",
        "default": "10",
        "help": "rewrites allowed for each operation before the patterns count as endless",
    }
    code, output = run_moec(["moec", "passes", "canonicalice", "2>&1"])
    assert code == 2 and "did you mean 'canonicalize'?" in output
    assert run_moec(["moec", "passes", "--json", "--markdown", "2>&1"])[0] == 2


def test_nothing_heavy_is_imported_and_hashing_does_not_matter(chain: Path) -> None:
    program = (
        "import sys\nfrom moec.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n"
        "    heavy = ('torch', 'onnx', 'transformers', 'numpy')\n"
        "    print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, "opt", str(chain), "-p", "canonicalize,cse,dce"]
    results = []
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        results.append(subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=True))
    assert [result.stderr.strip() for result in results] == ["[]", "[]"]
    assert results[0].stdout == results[1].stdout
