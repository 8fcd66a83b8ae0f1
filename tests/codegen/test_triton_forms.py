"""Kernels in Triton's interpreter against the reference executor: experts that are no whole feed-forward blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moec.codegen.triton.spec import Element
from moec.dialects.moe import Routing
from moec.dialects.quant import Integer, Levels, Span, Ternary, ZeroPoint
from moec.experts import FeedForward, LowRank, Projection
from moec.experts.expert import Banded, PartlyLowRank, Quantized
from moec.quantization.rounding import Target, round_matrix
from tests.codegen.triton_layers import Case, Outcome, outcomes
from tests.ir.expert_bodies import affine, constant, dense, latent, low_rank

HIDDEN = 32
COUNTS = (1, 9)
BOUNDS = {Element.FLOAT32: 1e-5, Element.FLOAT16: 2e-3, Element.BFLOAT16: 2e-2}
INT4, INT8 = Target(Integer(4)), Target(Integer(8))


def _packed(weight: torch.Tensor, target: Target) -> Quantized:
    return Quantized(round_matrix(target, weight.contiguous()))


def in_bands(expert: FeedForward) -> FeedForward:
    """The first 16 neurons in 8 bits, the others in 4."""

    def bands(projection: Projection, axis: int) -> Projection:
        first, rest = projection.dense().tensor_split([16], dim=axis)
        return replace(projection, matrix=Banded((_packed(first, INT8), _packed(rest, INT4)), axis))

    assert expert.gate is not None
    return replace(expert, gate=bands(expert.gate, 0), up=bands(expert.up, 0), down=bands(expert.down, 1))


def partly_factored(expert: FeedForward) -> FeedForward:
    """Some neurons whole, the others of rank 5, cut at another place in down than in gate and up."""

    def factored(projection: Projection, axis: int, kept: int) -> Projection:
        first, rest = projection.dense().tensor_split([kept], dim=axis)
        generator = torch.Generator().manual_seed(kept)
        left, right = (torch.randn(size, generator=generator) / 4 for size in ((rest.shape[0], 5), (5, rest.shape[1])))
        return replace(projection, matrix=PartlyLowRank(first.contiguous(), LowRank(left, right), axis))

    return replace(expert, up=factored(expert.up, 0, 7), down=factored(expert.down, 1, 12))


def of_unlike_formats(expert: FeedForward) -> FeedForward:
    """Gate in groups of 4 bits with zero points, up in trits, down as it was."""
    assert expert.gate is not None
    gate = _packed(expert.gate.dense(), Target(Integer(4, Span.GROUP, 32, ZeroPoint.INTEGER)))
    up = _packed(expert.up.dense(), Target(Ternary()))
    return replace(expert, gate=Projection(gate, expert.gate.bias), up=Projection(up, expert.up.bias))


def half_packed(expert: FeedForward) -> FeedForward:
    """Gate as it was, up in trits of two levels."""
    return replace(expert, up=Projection(_packed(expert.up.dense(), Target(Ternary(Levels.EXTREMES)))))


FOUR = (0, 1, 2, 3)
CASES = (
    Case("factored", [(low_rank(HIDDEN, 40, 3), FOUR)]),
    Case("factored beside a base", [(low_rank(HIDDEN, 24, 5, base=True), FOUR)]),
    Case("latent", [(latent(HIDDEN, 24, 20), FOUR)]),
    Case(
        "every kind in one layer",
        [
            (dense(HIDDEN, 24, bias=True), (0,)),
            (low_rank(HIDDEN, 40, 3), (1, 6)),
            (latent(HIDDEN, 16, 8), (2,)),
            (latent(HIDDEN, 40, 20, name="second"), (3, 5)),
            (constant(HIDDEN), (4,)),
            (affine(HIDDEN, 6), (7,)),
            (dense(HIDDEN, 0, name="empty"), (8,)),
        ],
        (0, 1, 2, 3, 4, 5, 6, 7, 8, 2, -1),
        Routing(k=6),
    ),
    Case("constants", [(constant(HIDDEN), FOUR)]),
    Case("of width 0 alone", [(dense(HIDDEN, 0), (0, 1)), (constant(HIDDEN), (2, 3))]),
    Case("trits of two levels", packed=dict.fromkeys(FOUR, Target(Ternary(Levels.EXTREMES)))),
    Case("bands", changed={0: in_bands, 3: in_bands}, packed={1: INT4}),
    Case("partly factored", [(dense(HIDDEN, 48, bias=True), FOUR)], changed={1: partly_factored}),
    Case("gate and up in unlike formats", changed={0: of_unlike_formats, 1: half_packed}),
    Case("a router of several operations", features=6),
    Case("a shared expert", shared=[(dense(HIDDEN, 40), False)]),
    Case(
        "two shared experts, one with a gate, and bands",
        shared=[(dense(HIDDEN, 24), True), (dense(HIDDEN, 72, bias=True), False)],
        changed={2: in_bands},
        stored=(0, 1, 2, 3, 2, -1),
        routing=Routing(k=3),
    ),
)
BY_NAME = {case.name: case for case in CASES}
# what the others compute is in these too
_ALONE = ("factored", "latent", "constants", "of width 0 alone", "bands", "a shared expert")
FAST = {
    Element.FLOAT32: [case for case in CASES if case.name not in _ALONE],
    Element.BFLOAT16: [BY_NAME["every kind in one layer"]],
}

Found = dict[tuple[Element, str, int], Outcome]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return outcomes(FAST, COUNTS, tmp_path_factory.mktemp("forms"))


@pytest.mark.parametrize(
    ("element", "name"),
    [(element, case.name) for element, some in FAST.items() for case in some],
    ids=lambda value: value.value if isinstance(value, Element) else value,
)
def test_equals_the_reference(element: Element, name: str, found: Found) -> None:
    for count in COUNTS:
        assert found[element, name, count].difference() <= BOUNDS[element], count


@pytest.mark.slow
@pytest.mark.parametrize("element", list(Element), ids=lambda element: element.value)
def test_every_form_in_every_element_type(element: Element, tmp_path: Path) -> None:
    for (_, name, count), outcome in outcomes({element: CASES}, (1, 2, 40), tmp_path).items():
        assert outcome.difference() <= BOUNDS[element], (name, count)
