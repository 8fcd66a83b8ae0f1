"""docs/architectures_onnx.md says what is true, and at least 40 decoders compile."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.frontend.architectures import MODEL_TYPES
from tests.slow.decoders import Status, examine

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "architectures_onnx.md"


def promised() -> dict[str, str]:
    """What the page says of each model type: `ok`, or `refused`."""
    rows = [line.split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return {row[1].strip(): row[3].split(":")[0].strip() for row in rows[1:]}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_decoder_does_what_the_page_promises(model_type: str) -> None:
    outcome = examine(model_type)
    assert outcome.status.value == promised()[model_type], outcome.detail


def test_at_least_40_compile() -> None:
    page = promised()
    assert set(page) == set(MODEL_TYPES)
    assert set(page.values()) <= {Status.OK.value, Status.REFUSED.value}
    assert sum(status == Status.OK.value for status in page.values()) >= 40
