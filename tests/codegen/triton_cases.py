"""Layers that the generated kernels are run on: experts of every kind and every format that they cover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moec.codegen.triton.spec import Element
from moec.dialects.moe import Routing, Select
from moec.dialects.quant import Format, Integer, Levels, Span, Ternary, TritPacking, ZeroPoint
from moec.experts import FeedForward, LowRank, Projection
from moec.experts.expert import Banded, PartlyLowRank, Quantized
from moec.quantization.rounding import Target, round_matrix
from tests.codegen.triton_layers import HIDDEN, Case
from tests.ir.expert_bodies import affine, constant, dense, latent, low_rank


@dataclass(frozen=True)
class Suite:
    """Cases of one hidden size. `fast` are those of the fast tests: element types differ in the same few lines."""

    name: str
    hidden: int
    cases: Sequence[Case]
    fast: Mapping[Element, Sequence[str]]

    def chosen(self) -> dict[Element, list[Case]]:
        """The cases of the fast tests."""
        return {element: [case for case in self.cases if case.name in names] for element, names in self.fast.items()}


_EVERYONE = tuple(range(16))
_PLAIN = (
    Case("equal"),
    Case("sixteen", [(dense(HIDDEN, 16), _EVERYONE)], _EVERYONE, Routing(k=3)),
    Case(
        "ragged widths",
        [(dense(HIDDEN, 40, name="wide"), (0, 3)), (dense(HIDDEN, 5, name="narrow"), (1, 2))],
    ),
    Case(
        "an expert of width 0",
        [(dense(HIDDEN, 24, name="wide"), (0, 2)), (dense(HIDDEN, 0, name="empty"), (1, 3))],
    ),
    Case("biases", [(dense(HIDDEN, 20, bias=True), (0, 1)), (dense(HIDDEN, 33, bias=True, name="wide"), (2, 3))]),
    Case("several outputs for an expert, and outputs for none", stored=(0, 1, 1, 3, 2, -1), routing=Routing(k=3)),
    Case("all tokens to one expert", router_bias=torch.tensor([0.0, 99.0, 0.0, 0.0]), routing=Routing(k=1)),
    Case("an expert without tokens", router_bias=torch.tensor([0.0, 0.0, -99.0, 0.0])),
    Case("empty slots", routing=Routing(select=Select.THRESHOLD, p=0.3)),
)


PACKED_HIDDEN, PACKED_WIDTH = 160, 96

_FORMATS: dict[str, Format] = {
    "int8": Integer(8),
    "int8 in groups": Integer(8, Span.GROUP, 32),
    "int5 with numbers as zero points": Integer(5, Span.ROW, 0, ZeroPoint.FLOAT),
    "int4 in groups of 32 with zero points": Integer(4, Span.GROUP, 32, ZeroPoint.INTEGER),
    "int4 in groups of 16": Integer(4, Span.GROUP, 16),
    "int8 in groups of 16 with zero points": Integer(8, Span.GROUP, 16, ZeroPoint.INTEGER),
    "int3 of a row": Integer(3),
    "int2 in groups": Integer(2, Span.GROUP, 16, ZeroPoint.FLOAT),
    "signs": Integer(1),
    "trits": Ternary(),
    "trits in groups, five in a byte": Ternary(Levels.SCALE, Span.GROUP, 32, TritPacking.FIVE_PER_BYTE),
}


def packed_case(name: str, kind: Format) -> Case:
    """Two experts in a format."""
    experts = [(dense(PACKED_HIDDEN, PACKED_WIDTH), (0, 1))]
    return Case(name, experts, (0, 1), Routing(k=2), packed={0: Target(kind), 1: Target(kind)})


_MIXED = Case(
    "mixed bits, ragged widths",
    [(dense(PACKED_HIDDEN, 64, name="wide"), (0, 2, 4)), (dense(PACKED_HIDDEN, 32, name="narrow"), (1, 3))],
    (0, 1, 2, 3, 4),
    Routing(k=3),
    packed={
        0: Target(Integer(4, Span.GROUP, 32)),
        1: Target(Ternary()),
        2: Target(Integer(8)),
        3: Target(Integer(4, Span.GROUP, 32)),
    },
)


_INT4, _INT8 = Target(Integer(4)), Target(Integer(8))


def _packed(weight: torch.Tensor, target: Target) -> Quantized:
    return Quantized(round_matrix(target, weight.contiguous()))


def _in_bands(expert: FeedForward) -> FeedForward:
    """The first 16 neurons in 8 bits, the others in 4."""

    def bands(projection: Projection, axis: int) -> Projection:
        first, rest = projection.dense().tensor_split([16], dim=axis)
        return replace(projection, matrix=Banded((_packed(first, _INT8), _packed(rest, _INT4)), axis))

    assert expert.gate is not None
    return replace(expert, gate=bands(expert.gate, 0), up=bands(expert.up, 0), down=bands(expert.down, 1))


def _partly_factored(expert: FeedForward) -> FeedForward:
    """Some neurons whole, the others of rank 5, cut at another place in down than in gate and up."""

    def factored(projection: Projection, axis: int, kept: int) -> Projection:
        first, rest = projection.dense().tensor_split([kept], dim=axis)
        generator = torch.Generator().manual_seed(kept)
        left, right = (torch.randn(size, generator=generator) / 4 for size in ((rest.shape[0], 5), (5, rest.shape[1])))
        return replace(projection, matrix=PartlyLowRank(first.contiguous(), LowRank(left, right), axis))

    return replace(expert, up=factored(expert.up, 0, 7), down=factored(expert.down, 1, 12))


def _of_unlike_formats(expert: FeedForward) -> FeedForward:
    """Gate in groups of 4 bits with zero points, up in trits, down as it was."""
    assert expert.gate is not None
    gate = _packed(expert.gate.dense(), Target(Integer(4, Span.GROUP, 32, ZeroPoint.INTEGER)))
    up = _packed(expert.up.dense(), Target(Ternary()))
    return replace(expert, gate=Projection(gate, expert.gate.bias), up=Projection(up, expert.up.bias))


def _half_packed(expert: FeedForward) -> FeedForward:
    """Gate as it was, up in trits of two levels."""
    return replace(expert, up=Projection(_packed(expert.up.dense(), Target(Ternary(Levels.EXTREMES)))))


_FOUR = (0, 1, 2, 3)
_FORMS = (
    Case("factored", [(low_rank(HIDDEN, 40, 3), _FOUR)]),
    Case("factored beside a base", [(low_rank(HIDDEN, 24, 5, base=True), _FOUR)]),
    Case("latent", [(latent(HIDDEN, 24, 20), _FOUR)]),
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
    Case("constants", [(constant(HIDDEN), _FOUR)]),
    Case("of width 0 alone", [(dense(HIDDEN, 0), (0, 1)), (constant(HIDDEN), (2, 3))]),
    Case("trits of two levels", packed=dict.fromkeys(_FOUR, Target(Ternary(Levels.EXTREMES)))),
    Case("bands", changed={0: _in_bands, 3: _in_bands}, packed={1: _INT4}),
    Case("partly factored", [(dense(HIDDEN, 48, bias=True), _FOUR)], changed={1: _partly_factored}),
    Case("gate and up in unlike formats", changed={0: _of_unlike_formats, 1: _half_packed}),
    Case("a router of several operations", features=6),
    Case("a shared expert", shared=[(dense(HIDDEN, 40), False)]),
    Case(
        "two shared experts, one with a gate, and bands",
        shared=[(dense(HIDDEN, 24), True), (dense(HIDDEN, 72, bias=True), False)],
        changed={2: _in_bands},
        stored=(0, 1, 2, 3, 2, -1),
        routing=Routing(k=3),
    ),
)

SUITES = (
    Suite(
        "whole",
        HIDDEN,
        _PLAIN,
        {
            Element.FLOAT32: [case.name for case in _PLAIN],
            Element.FLOAT16: ["ragged widths", "biases"],
            Element.BFLOAT16: ["ragged widths", "biases"],
        },
    ),
    Suite(
        "packed",
        PACKED_HIDDEN,
        [*(packed_case(name, kind) for name, kind in _FORMATS.items()), _MIXED],
        {
            Element.FLOAT32: [
                "int8 in groups",
                "int4 in groups of 32 with zero points",
                "signs",
                "int4 in groups of 16",
            ],
            Element.FLOAT16: ["trits"],
            Element.BFLOAT16: [_MIXED.name],
        },
    ),
    Suite(
        "forms",
        HIDDEN,
        _FORMS,
        {
            Element.FLOAT32: [
                "factored beside a base",
                "every kind in one layer",
                "trits of two levels",
                "partly factored",
                "gate and up in unlike formats",
                "a router of several operations",
                "two shared experts, one with a gate, and bands",
            ],
            Element.BFLOAT16: ["every kind in one layer"],
        },
    ),
)
