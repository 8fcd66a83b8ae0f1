"""A model whose routing collapsed: experts that no token chooses cost next to nothing to lose."""

from __future__ import annotations

import dataclasses

import pytest

from moec.experts import find_moe_layers
from tests.quality import harness

FOLDER = harness.REPOSITORY.parent / "shared" / "models" / "moe8x-collapsed"
KEEP_MOST = "prune-experts{criterion=frequency keep=5}"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="the model with collapsed routing lies outside of the repository"),
]


@pytest.fixture
def collapsed(monkeypatch: pytest.MonkeyPatch) -> str:
    """Its name as a fixture; it has the layers, the tokens and the training text of tiny-moe."""
    fixture = dataclasses.replace(harness.FIXTURES["tiny-moe"], folder=FOLDER)
    monkeypatch.setitem(harness.FIXTURES, "collapsed", fixture)
    return "collapsed"


def test_calibration_counts_experts_that_nobody_chooses(collapsed: str) -> None:
    module = harness.calibrated(collapsed)
    assert module.calibration is not None
    counts = [module.calibration.statistics(layer).count for layer in find_moe_layers(module.op)]
    assert [int((count == 0).sum()) for count in counts] == [0, 1, 2, 0]
    assert all(int(count.sum()) == 2 * module.calibration.tokens for count in counts)


def test_rarely_chosen_experts_are_nearly_free(collapsed: str) -> None:
    by_use = harness.compress(collapsed, KEEP_MOST).increase
    at_random = harness.compress(collapsed, "prune-experts{criterion=random keep=5}").increase
    balanced = harness.compress("tiny-moe", KEEP_MOST).increase
    print(f"5 of 8 experts: by use {by_use:.4f}, at random {at_random:.4f}; balanced routing, by use {balanced:.4f}")
    assert 0 <= by_use < 0.004
    assert by_use < 0.5 * at_random
    assert by_use < 0.1 * balanced
