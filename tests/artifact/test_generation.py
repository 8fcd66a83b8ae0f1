"""Choosing tokens, padding, scoring: the parts that need no exported model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moec.artifact.generation import Sampling, choose, pad_left, pad_right
from moec.artifact.loss import LossSettings, cross_entropy, measure_loss, pieces
from moec.artifact.runtime import positions
from moec.artifact.text import TextCodec
from moec.errors import UnsafeInputError, UsageError

DEMO = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"


def test_greedy_takes_the_lower_id_of_a_tie() -> None:
    logits = np.array([[0.0, 3.0, 3.0], [5.0, 1.0, 5.0]], np.float32)
    assert choose(logits, Sampling(), np.random.default_rng(0)).tolist() == [1, 0]


def test_sampling_follows_the_distribution() -> None:
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = np.log(probabilities).astype(np.float32)[None].repeat(20000, axis=0)
    counts = np.bincount(choose(logits, Sampling(temperature=1.0, seed=1), np.random.default_rng(1)), minlength=4)
    assert counts / 20000 == pytest.approx(probabilities, abs=0.012)


def test_top_p_drops_the_tail() -> None:
    probabilities = np.array([0.05, 0.5, 0.3, 0.15])
    logits = np.log(probabilities).astype(np.float32)[None].repeat(5000, axis=0)
    chosen = choose(logits, Sampling(temperature=1.0, top_p=0.7), np.random.default_rng(2))
    assert set(chosen.tolist()) == {1, 2}
    assert (chosen == 1).mean() == pytest.approx(0.625, abs=0.03)


def test_low_temperature_is_greedy() -> None:
    logits = np.random.default_rng(3).normal(size=(50, 20)).astype(np.float32)
    cold = choose(logits, Sampling(temperature=1e-3), np.random.default_rng(0))
    assert cold.tolist() == logits.argmax(1).tolist()


def test_padding_and_positions() -> None:
    ids, mask = pad_left([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions(mask).tolist() == [[0, 1, 2], [0, 0, 0]]
    ids, mask = pad_right([[5, 6, 7], [8]])
    assert (ids.tolist(), mask.tolist()) == ([[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]])
    with pytest.raises(UsageError, match="no tokens"):
        pad_left([[1], []])


def test_cross_entropy_is_the_negative_log_likelihood() -> None:
    logits = np.random.default_rng(4).normal(size=(2, 70, 9)).astype(np.float32)
    targets = np.random.default_rng(5).integers(0, 9, (2, 70))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(probabilities, targets[..., None], -1)).sum()
    assert cross_entropy(logits, targets) == pytest.approx(expected, rel=1e-5)
    assert list(pieces(10, 4)) == [(0, 4), (4, 8), (8, 10)]


def test_loss_of_a_uniform_model_is_the_log_of_the_vocabulary() -> None:
    codec = TextCodec(DEMO)
    text = codec.encode_text("t", "In the beginning God created the heaven and the earth. " * 20)
    row = measure_loss(
        text, "uniform", lambda inputs, targets: targets.size * math.log(4096), LossSettings(window=32, batch=3)
    )
    assert row.nats_per_token == pytest.approx(math.log(4096))
    assert row.tokens == (len(text.ids) - 1) // 32 * 32
    scored_bytes = text.bytes_of(1, row.tokens + 1)
    assert 0 < scored_bytes < len(text.text)
    assert row.nats_per_byte == pytest.approx(row.nats_per_token * row.tokens / scored_bytes)
    assert measure_loss(text, "u", lambda a, b: 0.0, LossSettings(window=32, limit=64)).tokens == 64
    with pytest.raises(UsageError, match="fewer than one window"):
        measure_loss(text, "u", lambda a, b: 0.0, LossSettings(window=4096))


def test_text_survives_the_tokenizer(tmp_path: Path) -> None:
    codec = TextCodec(DEMO)
    text = "Thou shalt not – 世界 – covet.\n"
    encoded = codec.encode_text("t", text)
    assert codec.decode(encoded.ids.tolist()) == text
    assert encoded.bytes_of(0, len(encoded.ids)) == len(text.encode())
    assert codec.vocabulary_size == 4096
    assert codec.end_ids == {0}
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        TextCodec(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(UnsafeInputError, match="malformed"):
        TextCodec(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="not UTF-8"):
        codec.read(tmp_path / "latin.txt")
