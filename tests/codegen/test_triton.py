"""Generated kernels in Triton's interpreter against the reference executor: experts of every kind that they cover."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moec.codegen.triton.spec import Element
from moec.dialects.moe import Routing, Select
from tests.codegen.triton_layers import HIDDEN, Case, Outcome, outcomes
from tests.ir.expert_bodies import dense

# one token takes the path without sorting, several the other
COUNTS = (1, 9)
BOUNDS = {Element.FLOAT32: 1e-5, Element.FLOAT16: 2e-3, Element.BFLOAT16: 2e-2}

_EVERYONE = tuple(range(16))
CASES = (
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


BY_NAME = {case.name: case for case in CASES}
# what differs by the element type is the same code for every case
FAST = {
    Element.FLOAT32: CASES,
    Element.FLOAT16: [BY_NAME["ragged widths"], BY_NAME["biases"]],
    Element.BFLOAT16: [BY_NAME["ragged widths"], BY_NAME["biases"]],
}

Found = dict[tuple[Element, str, int], Outcome]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return outcomes(FAST, COUNTS, tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize(
    ("element", "name"),
    [(element, case.name) for element, some in FAST.items() for case in some],
    ids=lambda value: value.value if isinstance(value, Element) else value,
)
def test_equals_the_reference(element: Element, name: str, found: Found) -> None:
    for count in COUNTS:
        outcome = found[element, name, count]
        assert outcome.difference() <= BOUNDS[element], count
        assert torch.equal(outcome.found.ids, outcome.expected.ids), count
        torch.testing.assert_close(outcome.found.gates.double(), outcome.expected.gates, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("element", list(Element), ids=lambda element: element.value)
def test_every_case_in_every_element_type(element: Element, tmp_path: Path) -> None:
    for (_, name, count), outcome in outcomes({element: CASES}, (1, 2, 40), tmp_path).items():
        assert outcome.difference() <= BOUNDS[element], (name, count)
