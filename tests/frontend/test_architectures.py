"""Every decoder with experts that transformers has: what docs/architectures.md says of it is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.frontend.architectures import BOUND, MODEL_TYPES, load_and_compare

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


def _rows() -> dict[str, tuple[str, str]]:
    """(status, remark) by model type."""
    cells = re.findall(r"^\| (\w+) \| \w+ \| (ok|refused) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {model_type: (status, remark) for model_type, status, remark in cells}


def test_the_table_is_complete() -> None:
    rows = _rows()
    assert sorted(rows) == sorted(MODEL_TYPES)
    assert sum(status == "ok" for status, _ in rows.values()) >= 40


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_table_is_true(model_type: str, tmp_path: Path) -> None:
    status, remark = _rows()[model_type]
    outcome = load_and_compare(model_type, tmp_path)
    assert outcome.row().endswith(f"| {status} | {remark} |")
    assert outcome.error <= BOUND
