"""Kernels of packed experts in Triton's interpreter: every format alone, and several beside floats in one layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moec.codegen.triton.emit import emit_triton
from moec.codegen.triton.formats import code_matrix
from moec.codegen.triton.packing import CodedExpert, CodedProjection, pack_experts
from moec.codegen.triton.spec import Element
from moec.dialects.moe import Routing
from moec.dialects.quant import Codebook, Format, Integer, Levels, Span, Ternary, TritPacking, ZeroPoint
from moec.errors import UnsupportedModelError
from moec.experts import Quantized
from moec.quantization.rounding import Target, round_matrix
from tests.codegen.triton_layers import Case, Outcome, build, outcomes
from tests.ir.expert_bodies import dense

HIDDEN, WIDTH = 160, 96
COUNTS = (1, 6)
BOUNDS = {Element.FLOAT32: 1e-5, Element.FLOAT16: 2e-3, Element.BFLOAT16: 2e-2}

FORMATS: dict[str, Format] = {
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


def _case(name: str, kind: Format) -> Case:
    experts = [(dense(HIDDEN, WIDTH), (0, 1))]
    return Case(name, experts, (0, 1), Routing(k=2), packed={0: Target(kind), 1: Target(kind)})


CASES = [_case(name, kind) for name, kind in FORMATS.items()]
MIXED = Case(
    "mixed bits, ragged widths",
    [(dense(HIDDEN, 64, name="wide"), (0, 2, 4)), (dense(HIDDEN, 32, name="narrow"), (1, 3))],
    (0, 1, 2, 3, 4),
    Routing(k=3),
    packed={
        0: Target(Integer(4, Span.GROUP, 32)),
        1: Target(Ternary()),
        2: Target(Integer(8)),
        3: Target(Integer(4, Span.GROUP, 32)),
    },
)
BY_NAME = {case.name: case for case in CASES}
FAST = {
    Element.FLOAT32: [
        BY_NAME["int8 in groups"],
        BY_NAME["int4 in groups of 32 with zero points"],
        BY_NAME["signs"],
        BY_NAME["int4 in groups of 16"],
    ],
    Element.FLOAT16: [BY_NAME["trits"]],
    Element.BFLOAT16: [MIXED],
}

Found = dict[tuple[Element, str, int], Outcome]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return outcomes(FAST, COUNTS, tmp_path_factory.mktemp("packed"), HIDDEN)


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
def test_every_format_in_every_element_type(element: Element, tmp_path: Path) -> None:
    cases = {element: [*CASES, MIXED]}
    for (_, name, count), outcome in outcomes(cases, (1, 2, 40), tmp_path, HIDDEN).items():
        assert outcome.difference() <= BOUNDS[element], (name, count)


def test_four_codes_of_a_word_are_a_quarter_of_a_block_apart() -> None:
    matrix = torch.arange(256.0).reshape(1, 256).remainder(16) - 8
    coded = code_matrix(Quantized(round_matrix(Target(Integer(4)), matrix)), "")
    whole = CodedProjection(coded)
    packed = pack_experts([CodedExpert(256, None, whole, whole)], 256, Element.BFLOAT16)
    words = packed.tensors["input_int4"][:32].reshape(2, 16)
    codes = coded.values[0].reshape(2, 4, 16, 2).int()
    for plane in range(4):
        for half in range(2):
            assert torch.equal((words >> 16 * half + 4 * plane) & 15, codes[:, plane, :, half])


REFUSED = {
    "a table": (Codebook(4), "Codebook"),
    "groups of 8": (Integer(4, Span.GROUP, 8), "every 8 weights"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refuses_formats_without_a_kernel(name: str, tmp_path: Path) -> None:
    kind, reason = REFUSED[name]
    module = build([_case(name, kind)], HIDDEN, tmp_path / "store")
    with pytest.raises(UnsupportedModelError, match=reason):
        emit_triton(module, tmp_path, element=Element.FLOAT32)
