"""120 steps of learning from the source give a factorised model back most of what choosing experts cost.

What is measured on are passages that nothing learned from: neither the small dense model nor `tune`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import moec
from moec.artifact.options import RAISING_PIPELINE
from moec.frontend.huggingface import load_huggingface
from moec.module import Module
from moec.weights.store import WeightStore
from tests.experts.models import copy_of
from tests.quality import harness
from tests.quality.dense_to_moe import EXPERTS, HELDOUT, LENGTH, MODEL, SEEDS


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_half_of_the_gap_to_the_dense_model_is_closed_on_other_passages(seed: int, tmp_path: Path) -> None:
    """At 4 of 8 experts. The dense model counts as it is, or after as many steps on the same text if that is better."""
    module = load_huggingface(MODEL, WeightStore(tmp_path / "store"))
    moec.run_passes(module, f"{RAISING_PIPELINE},factorize{{experts={EXPERTS}}},calibrate,init-router", seed=seed)
    dense, sparse = copy_of(module), copy_of(module)
    moec.run_passes(sparse, "set-routing{k=4 scale=calibrated}", seed=seed)
    before, untuned = heldout_loss(sparse), heldout_loss(dense)
    moec.run_passes(sparse, "tune", seed=seed)
    moec.run_passes(dense, "tune{target=text}", seed=seed)
    after, tuned = heldout_loss(sparse), heldout_loss(dense)
    closed = (before - after) / (before - min(untuned, tuned))
    print(f"seed {seed}: {before:.4f} -> {after:.4f}, dense {untuned:.4f} -> {tuned:.4f}: {closed:.0%}")
    assert before > untuned
    assert closed >= 0.5


def heldout_loss(module: Module) -> float:
    """Nats per byte, the mean over the held-out texts."""
    return float(np.mean([harness.loss(module, text, sequences=64, length=LENGTH).mean() for text in HELDOUT]))
