"""Which experts to drop: orderings of criteria on trained models, over seeds of the calibration."""

from __future__ import annotations

import pytest

from tests.quality.harness import increases

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("quality-drop")]

MODELS = ("scratch", "upcycled")
KEPT = (12, 8, 4)


def dropped(name: str, criterion: str, keep: int) -> float:
    """Mean increase over the seeds."""
    return float(increases(name, f"prune-experts{{criterion={criterion} keep={keep}}}").mean())


@pytest.mark.parametrize("keep", [12, 8])
@pytest.mark.parametrize("name", MODELS)
def test_summed_saliency_is_better_than_counting_tokens(name: str, keep: int) -> None:
    assert dropped(name, "reap-sum", keep) < 0.85 * dropped(name, "frequency", keep)


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("name", MODELS)
def test_counting_tokens_is_better_than_chance(name: str, keep: int) -> None:
    assert dropped(name, "frequency", keep) < 0.95 * dropped(name, "random", keep)


@pytest.mark.parametrize(
    ("name", "keep"), [("scratch", 12), ("scratch", 8), ("scratch", 4), ("upcycled", 12), ("upcycled", 8)]
)
def test_layer_error_is_better_than_counting_tokens(name: str, keep: int) -> None:
    assert dropped(name, "naee-greedy", keep) < dropped(name, "frequency", keep)


@pytest.mark.parametrize(
    ("name", "criterion"), [("scratch", "reap-sum"), ("upcycled", "reap-sum"), ("upcycled", "naee-greedy")]
)
def test_with_a_quarter_of_the_experts_left_criteria_hardly_differ_from_counting(name: str, criterion: str) -> None:
    """Not what larger models show: on these the better criteria are no longer better, and all are near chance."""
    found, frequency = dropped(name, criterion, 4), dropped(name, "frequency", 4)
    assert 0.9 * frequency < found < 1.2 * frequency
