"""One row of a stack, and one expression for one tensor however it was cut."""

from __future__ import annotations

import pytest
import torch

from moec.weights.context import WeightContext
from moec.weights.expression_parser import parse_expression
from moec.weights.rows import joined_parts, row_of, simplified

TENSORS = {
    **{f"e.{index}.w1": torch.arange(12.0).reshape(3, 4) + 100 * index for index in range(3)},
    **{f"e.{index}.w3": torch.arange(12.0).reshape(3, 4) + 100 * index + 50 for index in range(3)},
    "bank": torch.arange(72.0).reshape(3, 6, 4),
}
WEIGHTS = WeightContext(in_memory=TENSORS)

ROWS = {
    "stack(0, e.{0:3}.w1)": "e.1.w1",
    "concat(1, stack(0, e.{0:3}.w1), stack(0, e.{0:3}.w3))": "concat(0, e.1.w1, e.1.w3)",
    "concat(0, stack(0, e.0.w1), stack(0, e.{1,2}.w3))": "e.1.w3",
    "transpose(stack(0, e.{0:3}.w1), 1, 2)": "transpose(e.1.w1, 0, 1)",
    "slice(stack(0, e.{0:3}.w1), 0, 1, 3, 1)": "e.2.w1",
    "cast(stack(0, e.{0:3}.w1), f64)": "cast(e.1.w1, f64)",
    "slice(bank, 1, 0, 3, 1)": "slice(reshape(slice(bank, 0, 1, 2, 1), 6, 4), 0, 0, 3, 1)",
    "concat(0, slice(bank, 0, 2, 3, 1), slice(bank, 0, 0, 1, 1))": "reshape(slice(bank, 0, 0, 1, 1), 6, 4)",
}


@pytest.mark.parametrize("stack", ROWS)
def test_row_is_read_from_the_tensor_that_holds_it(stack: str) -> None:
    whole = parse_expression(stack)
    row = row_of(whole, 1, WEIGHTS)
    assert str(row) == str(parse_expression(ROWS[stack]))
    assert torch.equal(WEIGHTS.load(row), WEIGHTS.load(whole)[1])


SIMPLIFIED = {
    "slice(concat(0, e.0.w1, e.0.w3), 0, 3, 6, 1)": "e.0.w3",
    "slice(concat(0, e.0.w1, e.0.w3), 0, 4, 6, 1)": "slice(e.0.w3, 0, 1, 3, 1)",
    "slice(concat(0, e.0.w1, e.0.w3), 0, 2, 5, 1)": "slice(concat(0, e.0.w1, e.0.w3), 0, 2, 5, 1)",
    "slice(concat(0, e.0.w1, e.0.w3), 0, 0, 6, 2)": "slice(concat(0, e.0.w1, e.0.w3), 0, 0, 6, 2)",
    "slice(e.0.w1, 0, 0, 3, 1)": "e.0.w1",
    "slice(cast(concat(0, e.0.w1, e.0.w3), f64), 0, 0, 3, 1)": "cast(e.0.w1, f64)",
    "concat(0, slice(e.0.w1, 0, 0, 1, 1), slice(e.0.w1, 0, 1, 3, 1))": "e.0.w1",
    "concat(0, slice(e.0.w1, 0, 1, 3, 1), slice(e.0.w1, 0, 0, 1, 1))": (
        "concat(0, slice(e.0.w1, 0, 1, 3, 1), slice(e.0.w1, 0, 0, 1, 1))"
    ),
    "concat(0, slice(e.0.w1, 0, 0, 1, 1), slice(e.0.w1, 0, 1, 2, 1))": (
        "concat(0, slice(e.0.w1, 0, 0, 1, 1), slice(e.0.w1, 0, 1, 2, 1))"
    ),
    "transpose(concat(0, slice(e.0.w1, 0, 0, 1, 1), slice(e.0.w1, 0, 1, 3, 1)), 0, 1)": "transpose(e.0.w1, 0, 1)",
    "concat(0, cast(slice(e.0.w1, 0, 0, 1, 1), f64), cast(slice(e.0.w1, 0, 1, 3, 1), f64))": ("cast(e.0.w1, f64)"),
}


@pytest.mark.parametrize("text", SIMPLIFIED)
def test_cuts_and_joins_that_cancel(text: str) -> None:
    expression = parse_expression(text)
    found = simplified(expression, WEIGHTS)
    assert str(found) == str(parse_expression(SIMPLIFIED[text]))
    assert torch.equal(WEIGHTS.load(found), WEIGHTS.load(expression))


def test_parts_of_a_joined_tensor() -> None:
    parts = joined_parts(parse_expression("cast(concat(0, e.0.w1, concat(0, e.1.w1, e.2.w1)), f64)"))
    assert [str(part) for part in parts] == ["e.0.w1", "e.1.w1", "e.2.w1"]
