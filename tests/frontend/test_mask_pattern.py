"""What mask functions of transformers mean, asked position by position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import masking_utils

from moec.errors import UnsupportedModelError
from moec.frontend import hooks
from moec.frontend.mask_pattern import AttentionMaskPattern, probe_mask_function


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (masking_utils.causal_mask_function, AttentionMaskPattern(True)),
        (masking_utils.bidirectional_mask_function, AttentionMaskPattern(False)),
        (masking_utils.sliding_window_causal_mask_function(1), AttentionMaskPattern(True, window=1)),
        (masking_utils.sliding_window_causal_mask_function(8), AttentionMaskPattern(True, window=8)),
        (masking_utils.sliding_window_causal_mask_function(4096), AttentionMaskPattern(True, window=4096)),
        (masking_utils.chunked_causal_mask_function(5, torch.tensor([7, 9])), AttentionMaskPattern(True, chunk=5)),
        (masking_utils.chunked_causal_mask_function(8192, torch.zeros(2)), AttentionMaskPattern(True, chunk=8192)),
        # transformers includes the bound on both sides: |query - key| <= 4
        (masking_utils.sliding_window_bidirectional_mask_function(4), AttentionMaskPattern(False, window=5)),
    ],
)
def test_known_patterns(function: Any, expected: AttentionMaskPattern) -> None:
    assert probe_mask_function(function) == expected


@pytest.mark.parametrize(
    "function",
    [
        lambda batch, head, query, key: (key <= query) & (key % 2 == 0),
        lambda batch, head, query, key: key < query,
        lambda batch, head, query, key: (query - key < 4) & (query >= 0),
        lambda batch, head, query, key: (key <= query) & (batch > 0),
        masking_utils.sliding_window_causal_mask_function(0),
        masking_utils.padding_mask_function(torch.ones(3, 8, dtype=torch.bool)),
        masking_utils.and_masks(
            masking_utils.causal_mask_function, masking_utils.blockwise_overlay(torch.zeros(3, 9, dtype=torch.int64))
        ),
    ],
)
def test_other_functions_are_refused(function: Any) -> None:
    with pytest.raises(UnsupportedModelError):
        probe_mask_function(function)


@pytest.mark.parametrize(
    "pattern", [AttentionMaskPattern(True), AttentionMaskPattern(True, window=3), AttentionMaskPattern(True, chunk=4)]
)
def test_operation_agrees_with_transformers(pattern: AttentionMaskPattern) -> None:
    """The CPU implementation of the operation against transformers' own mask, left padding included."""
    padding = torch.ones(3, 11, dtype=torch.bool)
    padding[1, :2], padding[2, :5] = False, False
    if pattern.window:
        function = masking_utils.sliding_window_causal_mask_function(pattern.window)
    elif pattern.chunk:
        function = masking_utils.chunked_causal_mask_function(pattern.chunk, torch.tensor([0, 2, 5]))
    else:
        function = masking_utils.causal_mask_function
    expected = masking_utils.sdpa_mask(
        3, 11, 11, mask_function=function, attention_mask=padding, allow_is_causal_skip=False
    )
    found = hooks.attention_mask(padding, 11, pattern.causal, pattern.window, pattern.chunk)
    assert torch.equal(found, expected)
