"""Malformed text: a clear error with its line, exit code 2, in bounded time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from moec.errors import MoecError
from moec.ir import VerifyError, parse_module, verify
from moec.ir.parser import ParseError
from tests.filecheck_plugin import run_moec

HEAD = '"builtin.module"() ({\n'
TAIL = "\n}) : () -> ()"


def in_function(body: str) -> str:
    """`body` inside a function of one argument `%x`; its first line is line 4."""
    return (
        '"builtin.module"() ({\n"func.func"() <{function_type = (tensor<4xf32>) -> (), sym_name = "main"}> ({\n'
        f'^bb0(%x: tensor<4xf32>):\n{body}\n"func.return"() : () -> ()\n}}) : () -> ()\n}}) : () -> ()'
    )


CASES = {
    "empty": ("", "the text ends early", 1),
    "only a comment": ("// nothing\n", "the text ends early", 2),
    "undefined value": (in_function('"t.a"(%y) : (tensor<4xf32>) -> ()'), "undefined value %y", 4),
    "defined twice": (
        in_function('%y = "t.a"() : () -> tensor<4xf32>\n%y = "t.a"() : () -> tensor<4xf32>'),
        "%y is defined twice",
        5,
    ),
    "another type": (in_function('"t.a"(%x) : (tensor<5xf32>) -> ()'), "%x is tensor<4xf32>, not tensor<5xf32>", 4),
    "another type before": (
        in_function('"t.a"(%y) : (tensor<5xf32>) -> ()\n%y = "t.a"() : () -> tensor<4xf32>'),
        "%y is tensor<4xf32> here but was used as tensor<5xf32>",
        5,
    ),
    "operand types missing": (in_function('"t.a"(%x) : () -> ()'), "1 operands but 0 operand types", 4),
    "result names missing": (in_function('%y = "t.a"() : () -> ()'), "0 results, but the text names 1", 4),
    "result names too many": (in_function('%y:3 = "t.a"() : () -> tensor<1xf32>'), "names 3", 4),
    "huge number of results": (in_function(f'%y:{"9" * 5000} = "t.a"() : () -> ()'), "number of results", 4),
    "unknown element type": (in_function('"t.a"() {k = tensor<4xf33>} : () -> ()'), "unknown element type 'f33'", 4),
    "unknown type": (in_function('%y = "t.a"() : () -> !llvm.ptr'), "unknown type '!llvm.ptr'", 4),
    "negative size": (in_function('%y = "t.a"() : () -> !moec.tensor<[-4], f32>'), "2**63-1", 4),
    "size of 10^30": (in_function(f'%y = "t.a"() : () -> tensor<{10**30}xf32>'), "2**63-1", 4),
    "size of 5000 digits": (in_function(f'%y = "t.a"() : () -> tensor<{"9" * 5000}xf32>'), "", 4),
    "malformed symbolic size": (in_function('%y = "t.a"() : () -> !moec.tensor<[a b], f32>'), "unexpected 'b'", 4),
    "symbolic division by zero": (
        in_function('%y = "t.a"() : () -> !moec.tensor<[a mod 0], f32>'),
        "divided by zero",
        4,
    ),
    "unknown attribute": (in_function('"t.a"() {k = #tt.shape<4>} : () -> ()'), "unknown attribute #tt.shape", 4),
    "unknown enum member": (in_function('"t.a"() {k = #moe.score<tanh>} : () -> ()'), "'tanh' is none of softmax", 4),
    "unknown struct field": (
        in_function('"t.a"() {k = #moe.routing<topk = 2>} : () -> ()'),
        "unexpected keyword argument 'topk'",
        4,
    ),
    "attribute twice": (in_function('"t.a"() {k = 1, k = 2} : () -> ()'), "attribute k is given twice", 4),
    "attribute missing": (in_function('"t.a"() {k = } : () -> ()'), "unexpected '}'", 4),
    "number too large": (in_function('"t.a"() {k = 1.0e999} : () -> ()'), "too large for f64", 4),
    "integer too large": (in_function(f'"t.a"() {{k = {"9" * 5000}}} : () -> ()'), "integer is too large", 4),
    "bits too many": (in_function('"t.a"() {k = 0x11111111111111111 : f64} : () -> ()'), "bits are too many", 4),
    "integer of another width": (in_function('"t.a"() {k = 1 : i7} : () -> ()'), "not i7", 4),
    "odd dense constant": (in_function('"t.a"() {k = #moec.dense<"abc">} : () -> ()'), "even number of digits", 4),
    "unterminated string": (in_function('"t.a() : () -> ()'), "unterminated string", 4),
    "string that is not UTF-8": (in_function('"t.a"() {k = "\\FF\\FE"} : () -> ()'), "not UTF-8", 4),
    "unexpected character": (in_function("€"), "unexpected character '€'", 4),
    "unquoted operation": (in_function("func.call() : () -> ()"), "name of an operation in quotes", 4),
    "two blocks": (in_function('"t.a"() ({\n^bb0:\n^bb1:\n}) : () -> ()'), "a region holds one block", 6),
    "region not closed": (HEAD, "ends early", 2),
    "text behind the module": (HEAD + TAIL + ' "t.a"() : () -> ()', "after the end of the operation", 3),
    "bad location": (in_function('"t.a"() : () -> () loc(42)'), "expected a location", 4),
    "bad line": (in_function(f'"t.a"() : () -> () loc("x":{"1" * 5000}:1)'), "expected a line or column", 4),
    "used before its definition": (
        in_function('"t.a"(%y) : (tensor<4xf32>) -> ()\n%y = "t.a"() : () -> tensor<4xf32>'),
        "operand 0 of t.a does not dominate this use",
        4,
    ),
    "used outside its region": (
        in_function('"t.a"() ({\n%y = "t.b"() : () -> tensor<4xf32>\n}) : () -> ()\n"t.c"(%y) : (tensor<4xf32>) -> ()'),
        "undefined value %y",
        7,
    ),
    "terminator in the middle": (
        in_function('"func.return"() : () -> ()'),
        "the terminator func.return must be the last operation",
        4,
    ),
    "result type that does not follow": (
        in_function(
            '%w = "moec.weight"() <{source = "w", weight_name = "w"}> : () -> tensor<4xf32>\n'
            '%y = "nn.rms_norm"(%x, %w) <{epsilon = 1.0e-06, operandSegmentSizes = [1, 1]}> '
            ": (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf16>"
        ),
        "nn.rms_norm gives (tensor<4xf16>), expected (tensor<4xf32>)",
        5,
    ),
    "unknown operation of torch": (in_function('"aten.nonsense.default"() : () -> ()'), "torch has no operation", 4),
}


@pytest.mark.parametrize("case", CASES)
def test_error_names_the_line(case: str) -> None:
    text, message, line = CASES[case]
    with pytest.raises((ParseError, VerifyError)) as caught:
        verify(parse_module(text, "bad.mlir"))
    error = caught.value
    assert isinstance(error, MoecError) and error.exit_code == 2
    assert message in error.message
    assert len(str(error)) < 4000
    assert f"bad.mlir:{line}:" in error.where


@pytest.mark.parametrize("case", ["undefined value", "used before its definition", "unterminated string"])
def test_command_line(case: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.mlir"
    file.write_text(CASES[case][0], encoding="utf-8")
    code, output = run_moec(["moec", "opt", str(file), "-o", str(tmp_path / "out.mlir"), "2>&1"])
    assert code == 2
    assert CASES[case][1] in output and f"bad.mlir:{CASES[case][2]}:" in output
    assert "Traceback" not in output
    assert [path.name for path in tmp_path.iterdir()] == ["bad.mlir"]


DEEP = {
    "regions": '"t.a"() ({\n' * 100_000,
    "closed regions": '"t.a"() ({\n' * 20_000 + "}) : () -> ()\n" * 20_000,
    "arrays": '"t.a"() {k = ' + "[" * 100_000,
    "function types": '"t.a"() {k = ' + "(" * 100_000,
    "sizes": '"t.a"() : () -> !moec.tensor<[' + "(" * 100_000 + "1" + ")" * 100_000 + "], f32>",
    "structs": '"t.a"() {k = ' + "#moe.class<experts = " * 100_000,
    "open types": '"t.a"() : ' + "tensor<" * 100_000,
    "one open type": '"t.a"() : () -> tensor<' + "4x" * 200_000,
    "open strings": '"\\"' * 200_000,
    "open symbols": '@"\\"' * 200_000,
    "blanks": '"t.a"()' + " " * 500_000 + "?",
    "comments": "//" + "/ " * 300_000 + "\n" * 100_000,
    "operands": '"t.a"(' + "%a, " * 100_000,
    "results": "%a, " * 100_000,
    "one long line": in_function('"t.a"() : () -> ()' * 1000 + "?"),
    "digits": '"t.a"() {k = ' + "1" * 400_000 + "} : () -> ()",
}


@pytest.mark.parametrize("case", DEEP)
def test_hostile_text_ends_in_time(case: str) -> None:
    start = time.process_time()
    with pytest.raises(ParseError) as caught:
        parse_module(DEEP[case])
    assert len(str(caught.value)) < 2000
    # a few tenths here; anything quadratic takes minutes
    assert time.process_time() - start < 10
