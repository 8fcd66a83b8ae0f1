"""Generated kernels, in Triton's interpreter or on a GPU, against the reference executor: experts of every kind."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

from moec.artifact.kernel_check import KERNEL_BOUNDS
from moec.codegen.triton.running import Place
from moec.codegen.triton.spec import Element
from tests.codegen.triton_cases import SUITES, Suite
from tests.codegen.triton_layers import PLACES, Outcome, outcomes

# one token takes the path without sorting, several the other
COUNTS = (1, 9)
BOUNDS = {Element(dtype.value): bound for dtype, bound in KERNEL_BOUNDS.items()}
BY_NAME = {suite.name: suite for suite in SUITES}

Found = dict[tuple[Element, str, int], Outcome]


@cache
def fast_outcomes(suite: str, place: Place) -> Found:
    """The fast cases of a suite, run in one process."""
    chosen = BY_NAME[suite]
    with tempfile.TemporaryDirectory() as folder:
        return outcomes(chosen.chosen(), COUNTS, Path(folder), chosen.hidden, place)


def _every_fast_case() -> list[object]:
    """In groups, so that one process runs the kernels of a suite."""
    found = []
    for place in PLACES:
        for suite in SUITES:
            for element, cases in suite.chosen().items():
                for case in cases:
                    found.append(
                        pytest.param(
                            suite.name,
                            place.values[0],
                            element,
                            case.name,
                            marks=[*place.marks, pytest.mark.xdist_group(f"triton {suite.name}")],
                            id=f"{place.id}-{element.value}-{case.name}",
                        )
                    )
    return found


@pytest.mark.parametrize(("suite", "place", "element", "name"), _every_fast_case())
def test_equals_the_reference(suite: str, place: Place, element: Element, name: str) -> None:
    for count in COUNTS:
        outcome = fast_outcomes(suite, place)[element, name, count]
        assert outcome.difference() <= BOUNDS[element], count
        if outcome.has_choice:
            assert torch.equal(outcome.found.ids, outcome.expected.ids), count
            torch.testing.assert_close(outcome.found.gates.double(), outcome.expected.gates, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("element", list(Element), ids=lambda element: element.value)
@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_every_case_in_every_element_type(suite: Suite, element: Element, place: Place, tmp_path: Path) -> None:
    found = outcomes({element: suite.cases}, (1, 2, 40), tmp_path, suite.hidden, place)
    for (_, name, count), outcome in found.items():
        assert outcome.difference() <= BOUNDS[element], (name, count)
