"""Text, shape and value of weight expressions, and that a part is read without the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moec.errors import UsageError
from moec.weights import evaluation
from moec.weights.checkpoint import Checkpoint
from moec.weights.context import WeightContext
from moec.weights.expression import (
    Cast,
    Concat,
    Expression,
    Fp8Block,
    Mxfp4,
    Permute,
    Reference,
    Reshape,
    Slice,
    Stack,
    Stored,
    Transpose,
    format_numbers,
)
from moec.weights.expression_parser import parse_expression

W1 = [f"layers.0.experts.{k}.w1" for k in range(8)]
W3 = [f"layers.0.experts.{k}.w3" for k in range(8)]


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(6, 4, generator=generator).to(torch.bfloat16) for name in W1 + W3}
    made["flat"] = torch.randn(24, 4, generator=generator)
    made["vector"] = torch.randn(7, generator=generator)
    made["scalar"] = torch.tensor(2.5)
    return made


@pytest.fixture(scope="module")
def context(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> WeightContext:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_file(tensors, folder / "model.safetensors")
    return WeightContext(Checkpoint.open(folder))


Tensors = dict[str, torch.Tensor]
VALUES: dict[str, Callable[[Tensors], torch.Tensor]] = {
    "flat": lambda t: t["flat"],
    "scalar": lambda t: t["scalar"],
    "stack(0, layers.0.experts.{0:8}.w1)": lambda t: torch.stack([t[name] for name in W1]),
    "stack(1, layers.0.experts.{0:8}.w1)": lambda t: torch.stack([t[name] for name in W1], 1),
    "stack(0, layers.0.experts.{0:3,5,7}.w1)": lambda t: torch.stack([t[W1[k]] for k in (0, 1, 2, 5, 7)]),
    "concat(1, stack(0, layers.0.experts.{0:8}.w1), stack(0, layers.0.experts.{0:8}.w3))": lambda t: torch.cat(
        [torch.stack([t[name] for name in W1]), torch.stack([t[name] for name in W3])], 1
    ),
    "concat(0, layers.0.experts.{0:8}.w1)": lambda t: torch.cat([t[name] for name in W1]),
    "concat(0, layers.0.experts.0.w1, layers.0.experts.0.w3)": lambda t: torch.cat([t[W1[0]], t[W3[0]]]),
    "transpose(stack(0, layers.0.experts.{0:8}.w1), 1, 2)": lambda t: torch.stack([t[name] for name in W1]).mT,
    "transpose(flat, 0, 1)": lambda t: t["flat"].T,
    "permute(stack(0, layers.0.experts.{0:8}.w1), 2, 0, 1)": lambda t: torch.stack([t[n] for n in W1]).permute(2, 0, 1),
    "slice(flat, 0, 3, 20, 4)": lambda t: t["flat"][3:20:4],
    "slice(slice(flat, 1, 1, 4, 2), 0, 5, 9, 1)": lambda t: t["flat"][5:9, 1:4:2],
    "reshape(flat, 4, 6, 4)": lambda t: t["flat"].reshape(4, 6, 4),
    "reshape(flat, 32, 3)": lambda t: t["flat"].reshape(32, 3),
    "reshape(flat, 96)": lambda t: t["flat"].reshape(96),
    "reshape(slice(vector, 0, 0, 1, 1))": lambda t: t["vector"][:1].reshape(()),
    "reshape(transpose(reshape(flat, 3, 2, 4, 4), 1, 2), 24, 4)": lambda t: (
        t["flat"].reshape(3, 2, 4, 4).transpose(1, 2).reshape(24, 4)
    ),
    "cast(stack(0, layers.0.experts.{0:8}.w1), f32)": lambda t: torch.stack([t[name] for name in W1]).float(),
    "cast(flat, f16)": lambda t: t["flat"].half(),
    "stack(0, transpose(layers.0.experts.{0:8}.w1, 0, 1))": lambda t: torch.stack([t[name].T for name in W1]),
    "concat(0, slice(flat, 0, 0, 5, 1), slice(flat, 0, 9, 24, 1), flat)": lambda t: torch.cat(
        [t["flat"][:5], t["flat"][9:], t["flat"]]
    ),
}
INDICES = (None, 0, -1, 2, slice(1, 3), slice(None, None, 2), slice(1, None, 3), slice(2, 2), slice(-2, None))


@pytest.mark.parametrize("text", VALUES)
def test_text_shape_and_value(text: str, context: WeightContext, tensors: Tensors) -> None:
    expression = parse_expression(text)
    assert str(expression) == text
    expected = VALUES[text](tensors)
    assert context.shape_dtype(text) == (tuple(expected.shape), expected.dtype)
    for index in INDICES if expected.ndim else (None,):
        value = context.load(expression, index)
        wanted = expected if index is None else expected[index]
        assert value.shape == wanted.shape and torch.equal(value, wanted), index
        assert value.is_contiguous()
    parts = list(context.chunks(text, limit=40))
    assert torch.equal(torch.cat(parts) if expected.ndim else parts[0], expected)


def test_list_of_experts_is_one_short_text() -> None:
    one = Stack(0, tuple(Reference(f"model.layers.7.mlp.experts.{k}.gate_proj.weight") for k in range(128)))
    other = Stack(0, tuple(Reference(f"model.layers.7.mlp.experts.{k}.up_proj.weight") for k in range(128)))
    text = str(Concat(1, (one, other)))
    assert text == (
        "concat(1, stack(0, model.layers.7.mlp.experts.{0:128}.gate_proj.weight), "
        "stack(0, model.layers.7.mlp.experts.{0:128}.up_proj.weight))"
    )
    assert parse_expression(text) == Concat(1, (one, other))


def test_braces_expand_together_in_one_argument() -> None:
    text = "stack(0, fp8_block(e.{0:300}.w, e.{0:300}.w_scale_inv, 128, 128))"
    parts = tuple(Fp8Block(Reference(f"e.{k}.w"), Reference(f"e.{k}.w_scale_inv"), 128, 128) for k in range(300))
    assert parse_expression(text) == Stack(0, parts)
    assert str(Stack(0, parts)) == text


def test_lists_that_differ_in_more_than_a_number_are_written_out() -> None:
    names = ["a.0.w", "b.1.w", "a.01.w", "a.2.w.3", "a.3.w.4", "a.4.w.4", "a.9.w.4"]
    expression = Concat(0, tuple(map(Reference, names)))
    assert str(expression) == "concat(0, a.0.w, b.1.w, a.01.w, a.2.w.3, a.{3:5,9}.w.4)"
    assert parse_expression(str(expression)) == expression


@pytest.mark.parametrize("name", ["12", "a b", 'quo"te', "brace{0:2}", "a,b", "é.weight", "stack(0", "a\\b", "{", "#"])
def test_odd_names_are_quoted(name: str) -> None:
    expression = Stack(0, (Reference(name), Reference(name)))
    assert '"' in str(expression)
    assert parse_expression(str(expression)) == expression


@pytest.mark.parametrize("name", ["stack", "f32", "0.weight", "a-b/c", "..", "_", "1e3"])
def test_plain_names(name: str) -> None:
    assert str(Reference(name)) == name
    assert parse_expression(name) == Reference(name)


def test_numbers() -> None:
    assert format_numbers([0, 1, 2, 5, 4, 3, 7, 8]) == "0:3,5,4,3,7:9"


MALFORMED = [
    "",
    "   ",
    "stack(",
    "stack(0)",
    "stack(0,)",
    "stack(a, b)",
    "stack(0, a",
    "stack(0, a))",
    "a b",
    "unknown(a)",
    "transpose(a, 0)",
    "transpose(a, 0, -1)",
    "slice(a, 0, 1, 2)",
    "cast(a, f33)",
    "cast(a)",
    "stored(abc)",
    "stored(" + "G" * 64 + ")",
    "a.{0:2}",
    "transpose(a.{0:2}, 0, 1)",
    "stack(0, a.{2:2})",
    "stack(0, a.{3:1})",
    "stack(0, a.{1:})",
    "stack(0, a.{0:1:2})",
    "stack(0, a.{,})",
    "stack(0, a.{0:999999999})",
    "stack(0, fp8_block(a.{0:2}, b.{0:3}, 1, 1))",
    "stack(0, " + ", ".join(["concat(0, a.{0:9999}.b)"] * 200) + ")",
    "stack(0, " * 100 + "a" + ")" * 100,
    '"unclosed',
    '"bad \\q escape"',
    "a\0b",
    "reshape(a, 99999999999999999999)",
    "permute(a, ١)",
]


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: text[:30] + f"#{len(text)}")
def test_malformed_text(text: str) -> None:
    with pytest.raises(UsageError, match="malformed") as caught:
        parse_expression(text)
    assert "character" in caught.value.where and len(str(caught.value)) < 600


WRONG = [
    "stack(2, layers.0.experts.0.w1, vector)",
    "stack(0, flat, vector)",
    "stack(5, flat, flat)",
    "concat(0, flat, layers.0.experts.0.w1)",
    "concat(1, flat, vector)",
    "concat(2, flat, flat)",
    "transpose(flat, 0, 2)",
    "permute(flat, 0, 0)",
    "permute(flat, 0)",
    "slice(flat, 0, 5, 3, 1)",
    "slice(flat, 0, 0, 25, 1)",
    "slice(flat, 0, 0, 5, 0)",
    "slice(flat, 2, 0, 1, 1)",
    "reshape(flat, 5, 5)",
    "fp8_block(flat, flat, 128, 128)",
    "mxfp4(flat, flat)",
]


@pytest.mark.parametrize("text", WRONG)
def test_parts_that_do_not_fit_together(text: str, context: WeightContext) -> None:
    with pytest.raises(UsageError, match="is wrong") as caught:
        context.shape_dtype(text)
    assert caught.value.where.startswith(text[:5])
    with pytest.raises(UsageError):
        context.load(text)


@pytest.mark.parametrize("index", [24, -25, 10**18, slice(None, None, -1)])
def test_index_out_of_range(index: int | slice, context: WeightContext) -> None:
    with pytest.raises(UsageError, match="index"):
        context.load("flat", index)


def test_scalar_has_no_index(context: WeightContext) -> None:
    with pytest.raises(UsageError, match="no index"):
        context.load("scalar", 0)


def test_only_the_wanted_part_is_read(context: WeightContext, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = context.checkpoint
    assert checkpoint is not None
    read: list[tuple[str, int]] = []
    original = checkpoint.read

    def recording(name: str, region: tuple[range, ...] | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        value = original(name, region, out)
        read.append((name, value.numel()))
        return value

    monkeypatch.setattr(checkpoint, "read", recording)
    context.shape_dtype("concat(1, stack(0, layers.0.experts.{0:8}.w1), stack(0, layers.0.experts.{0:8}.w3))")
    assert read == []
    context.load("cast(concat(1, stack(0, layers.0.experts.{0:8}.w1), stack(0, layers.0.experts.{0:8}.w3)), f32)", 3)
    assert read == [(W1[3], 24), (W3[3], 24)]
    read.clear()
    context.load("transpose(concat(0, layers.0.experts.{0:8}.w1), 0, 1)", 2)
    assert read == [(name, 6) for name in W1]
    read.clear()
    context.load("reshape(flat, 12, 2, 4)", slice(4, 6))
    assert read == [("flat", 16)]
    read.clear()
    context.load("slice(flat, 0, 3, 20, 4)", 1)
    assert read == [("flat", 4)]


NAMES = st.sampled_from(["a.0.w", "a.1.w", "a.2.w", "a.2.v", "b c", "7", "x.10"])


def _extend(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    numbers = st.integers(0, 4)
    lists = st.lists(inner, min_size=1, max_size=5).map(tuple)
    dtypes = st.sampled_from([torch.float32, torch.uint8, torch.complex64, torch.float8_e4m3fn])
    return st.one_of(
        st.builds(Stack, numbers, lists),
        st.builds(Concat, numbers, lists),
        st.builds(Transpose, inner, numbers, numbers),
        st.builds(Permute, inner, st.lists(numbers, max_size=3).map(tuple)),
        st.builds(Slice, inner, numbers, numbers, numbers, numbers),
        st.builds(Reshape, inner, st.lists(numbers, max_size=3).map(tuple)),
        st.builds(Cast, inner, dtypes),
        st.builds(Fp8Block, inner, inner, numbers, numbers),
        st.builds(Mxfp4, inner, inner),
    )


EXPRESSIONS = st.recursive(st.builds(Reference, NAMES) | st.just(Stored("ab" * 32)), _extend, max_leaves=12)


@settings(max_examples=300, deadline=None)
@given(EXPRESSIONS)
def test_text_is_canonical(expression: Expression) -> None:
    text = str(expression)
    assert parse_expression(text) == expression
    assert str(parse_expression(text)) == text


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='stackonc(0123),{}:. "\\fp8_bl', max_size=40))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        expression = parse_expression(text)
    except UsageError:
        return
    assert parse_expression(str(expression)) == expression


def test_casts_of_large_tensors_are_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_PART_BYTES", 100)
    tensor = torch.randn(37, 5, 3)
    context = WeightContext(in_memory={"w": tensor, "scalar": tensor[0, 0, 0], "empty": tensor[:0]})
    for index in (None, 3, slice(4, 30, 3)):
        assert torch.equal(context.load("cast(w, f16)", index), (tensor if index is None else tensor[index]).half())
    assert context.load("cast(scalar, f64)").dtype == torch.float64
    assert context.load("cast(empty, f64)").shape == (0, 5, 3)


def test_digest_follows_content(context: WeightContext, tensors: Tensors, tmp_path: Path) -> None:
    renamed = {f"other.{name}": tensor for name, tensor in tensors.items()}
    other = WeightContext(in_memory=renamed)
    text = "cast(stack(0, layers.0.experts.{0:8}.w1), f32)"
    digest = context.digest(text)
    assert other.digest(text.replace("layers", "other.layers")) == digest
    renamed["other.layers.0.experts.5.w1"] = renamed["other.layers.0.experts.5.w1"] + 1
    assert WeightContext(in_memory=renamed).digest(text.replace("layers", "other.layers")) != digest
    different = ["stack(0, layers.0.experts.{0:8}.w1)", "cast(stack(1, layers.0.experts.{0:8}.w1), f32)"]
    different += ["cast(stack(0, layers.0.experts.{0:7}.w1), f32)", "cast(stack(0, layers.0.experts.{0:8}.w3), f32)"]
    assert len({digest, *map(context.digest, different)}) == 5


def test_references_in_order() -> None:
    expression = parse_expression("concat(1, stack(0, a.{0:2}.w), cast(b, f32))")
    assert [reference.name for reference in expression.references()] == ["a.0.w", "a.1.w", "b"]
