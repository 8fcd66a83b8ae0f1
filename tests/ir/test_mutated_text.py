"""Text with random damage either reads and verifies, or ends in an error of ours: nothing else comes out."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from moec.ir import VerifyError, parse_module, print_operation, structural_difference, verify
from moec.ir.lexer import ParseError, TokenStream

TEXT = Path(__file__).with_name("all_operations.mlir").read_text(encoding="utf-8")
TOKENS = [token for token in TokenStream(TEXT, "").tokens if token]
KINDS = sorted(set(TOKENS), key=lambda token: (len(token), token))
STRANGE = [
    "-1", "0", "1.0", "0x7FF8000000000000 : f64", "99999999999999999999", "true", "unit", "[]", "[[]]", "f32", '""',
    '"\\"', "@x", "loc(unknown)", "tensor<f32>", "tensor<0xf32>", "!moec.tensor<[seq mod 2], f32>", "#moec.dim<1>",
    '#moec.dense<"">', "#moe.routing<>", "#moe.class<experts = [0], operands = -1>", "#moe.score<relu>", "->", "%x",
    "-2", "[-1]", "[1, 0, 0]", "(tensor<f32>) -> ()", "9" * 30,
]  # fmt: skip

edits = st.lists(
    st.tuples(
        st.integers(0, len(TOKENS) - 1),
        st.sampled_from(["delete", "replace", "insert", "repeat"]),
        st.sampled_from([*KINDS, *STRANGE]),
    ),
    min_size=1,
    max_size=3,
)


def damaged(changes: list[tuple[int, str, str]]) -> str:
    """The text with tokens deleted, replaced, inserted or repeated."""
    tokens = list(TOKENS)
    for at, kind, token in changes:
        at = min(at, len(tokens) - 1)
        tokens[at : at + 1] = {
            "delete": [],
            "replace": [token],
            "insert": [token, tokens[at]],
            "repeat": [tokens[at], tokens[at]],
        }[kind]
    return " ".join(tokens)


@settings(max_examples=200, deadline=None)
@given(edits)
def test_damage_is_refused_or_harmless(changes: list[tuple[int, str, str]]) -> None:
    try:
        module = parse_module(damaged(changes), "damaged.mlir")
        verify(module)
    except (ParseError, VerifyError) as error:
        assert error.exit_code == 2 and error.message
        return
    again = parse_module(print_operation(module))
    verify(again)
    assert structural_difference(module, again) is None


def test_tokens_alone_are_the_text() -> None:
    assert structural_difference(parse_module(" ".join(TOKENS)), parse_module(TEXT)) is None
