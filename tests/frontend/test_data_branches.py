"""Branches on values of tensors: accepted where both sides are the same, refused where not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moec.errors import UnsupportedModelError
from moec.frontend.huggingface import load_huggingface
from moec.reference.executor import Executor
from tests.frontend.tiny_models import random_tokens, save_tiny_checkpoint, tiny_model


def _changes(long_scale: float) -> dict[str, Any]:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1] * 4,
        "long_factor": [2.0, 2.5] * 4,
        "short_mscale": 1.2,
        "long_mscale": long_scale,
        "original_max_position_embeddings": 16,
        "factor": 16.0,
    }
    return {"rope_parameters": rope}


def test_the_published_scales_of_phimoe(tmp_path: Path) -> None:
    """One scale for short and long texts, as in Phi-3.5-MoE: shorter and longer than the branch's bound."""
    changes = _changes(1.2)
    module = load_huggingface(save_tiny_checkpoint("phimoe", tmp_path, **changes))
    model = tiny_model("phimoe", **changes)
    for length in (9, 30):
        ids = random_tokens(2, length)
        positions = torch.arange(length).expand(2, -1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
        with torch.no_grad():
            (found,) = Executor(module.op, module.weights).run(given).values()
            expected = model(**given).logits
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_scales_that_depend_on_the_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="branches differ"):
        load_huggingface(save_tiny_checkpoint("phimoe", tmp_path, **_changes(1.3)))
