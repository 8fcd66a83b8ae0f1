"""When two results count as the same."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BOUND = 1e-4


def assert_same_logits(actual: NDArray[np.float32], expected: NDArray[np.float32], mask: NDArray[np.int64]) -> None:
    """Largest difference at most `BOUND` of the largest logit, and the same argmax except where two logits tie.

    Both [batch, seq, vocabulary]; only the tokens that `mask` [batch, seq] keeps count.
    """
    assert_close(actual, expected, mask)
    kept = mask.astype(bool)
    actual, expected = actual[kept], expected[kept]
    ordered = np.sort(expected, axis=-1)
    tied = ordered[:, -1] - ordered[:, -2] <= 2 * BOUND * np.abs(expected).max()
    differs = actual.argmax(-1) != expected.argmax(-1)
    assert not (differs & ~tied).any(), f"{int((differs & ~tied).sum())} of {len(differs)} tokens have another argmax"


def assert_close(actual: NDArray[np.float32], expected: NDArray[np.float32], mask: NDArray[np.int64]) -> None:
    """Largest difference at most `BOUND` of the largest value, at the tokens that `mask` [batch, seq] keeps."""
    kept = mask.astype(bool)
    difference = relative_difference(actual[kept], expected[kept])
    assert difference <= BOUND, f"largest difference {difference:.2e} of the largest value"


def relative_difference(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest |actual - expected| over the largest |expected|; NaN if either has one."""
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
