"""The models and texts that all other measurements stand on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moec.artifact.text import TextCodec
from tests.quality import harness
from tests.quality.corpus import DATA, SLICES, slice_path, training_text


@pytest.mark.parametrize(("name", "expected"), [("scratch", 1.588), ("upcycled", 1.531)])
def test_models_predict_held_out_text_as_their_cards_say(name: str, expected: float) -> None:
    losses = harness.source_losses(name)
    assert losses.shape == (160,)
    assert losses.mean() == pytest.approx(expected, abs=1e-3)


def test_unchanged_module_costs_nothing() -> None:
    same = harness.compress("scratch", "canonicalize")
    assert same.increase == 0.0
    assert same.expert_share == 1.0
    assert same.expert_bytes == 3 * 16 * 3 * 64 * 64 * 2


def test_no_passage_is_in_two_slices_or_in_the_training_text() -> None:
    passages = {name: _passages(slice_path(name).read_text(encoding="utf-8")) for name in SLICES}
    trained = _passages(training_text().decode("utf-8"))
    assert min(map(len, passages.values())) > 500
    assert len(trained) > 100_000
    for name, own in passages.items():
        others = trained.union(*(found for other, found in passages.items() if other != name))
        shared = own & others
        assert len(shared) <= 0.01 * len(own), sorted(shared)[:3]


def test_no_held_out_line_is_in_text_that_is_learned_from() -> None:
    """Of the texts that dense models become experts on: calibration and tuning, fine-tuning, measuring."""
    for name in ("kjv", "shakespeare"):
        learned = (harness.CALIBRATION_TEXTS / f"{name}.calibration.txt", DATA / f"{name}.training.txt")
        kept = _long_lines(harness.EXAMPLE_TEXTS / f"{name}.heldout.txt")
        assert len(kept) > 400
        assert kept.isdisjoint(set[str]().union(*(_long_lines(path) for path in learned)))


def _long_lines(path: Path) -> set[str]:
    return {line.strip() for line in path.read_text(encoding="utf-8").splitlines() if len(line.strip()) >= 40}


def _passages(text: str) -> set[str]:
    """All runs of five lines."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return {"\n".join(lines[start : start + 5]) for start in range(len(lines) - 4)}


def test_every_byte_is_one_token() -> None:
    codec = TextCodec(harness.FIXTURES["scratch"].folder)
    text = "def f(x):\n\treturn 'é€𝄞'  # \r\n"
    ids = codec.encode_text("text", text).ids
    assert ids.tolist() == list(text.encode())
    assert codec.decode(ids.tolist()) == text


def test_interval_holds_the_mean_and_shrinks_with_pairing() -> None:
    generator = np.random.default_rng(1)
    level = generator.normal(2.0, 0.5, 160)
    first = harness.Measured(level + 0.01 + generator.normal(0, 0.01, 160), 0.0, 1, 1.0)
    second = harness.Measured(level, 0.0, 1, 1.0)
    low, high = harness.paired_interval(first, second)
    assert low < 0.01 < high
    assert high - low < 0.005
    assert harness.paired_interval(first, second) == (low, high)
