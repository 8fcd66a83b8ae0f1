"""Decoding token by token through the cache gives what one pass over the whole sequence gives, left-padded rows too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moec.frontend.huggingface import load_huggingface
from moec.pipeline.manager import PassManager, Pipeline
from moec.reference.executor import Executor
from tests.frontend.tiny_models import TINY_MODELS, random_tokens, save_tiny_checkpoint
from tests.numerics.language_models import inputs_of

FAST = ("gemma2", "gpt_oss")
DECODERS = [name for name, model in TINY_MODELS.items() if not model.is_encoder]
PIPELINE = "canonicalize,cse,dce,expand-complex,raise-nn,raise-moe,canonicalize,cse,dce,add-kv-cache"
LENGTH, PREFILL = 14, 6


@pytest.mark.parametrize(
    "model_type", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in DECODERS]
)
def test_decoding_equals_one_pass(model_type: str, tmp_path: Path) -> None:
    """14 tokens, beyond the sliding window of 8: 6 at once, then one by one."""
    save_tiny_checkpoint(model_type, tmp_path)
    module = load_huggingface(tmp_path)
    ids, mask = random_tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, :4] = 0
    with torch.no_grad():
        whole = Executor(module.op, module.weights).run(inputs_of(module, ids, mask))["logits"]
        PassManager(Pipeline.parse(PIPELINE)).run(module.op, weights=module.weights, module=module)
        executor = Executor(module.op, module.weights)
        given = inputs_of(module, ids, mask)
        cache = {name: tensor for name, tensor in given.items() if name.startswith("past_key_values.")}
        assert cache
        pieces, start = [], 0
        for stop in [PREFILL, *range(PREFILL + 1, LENGTH + 1)]:
            step: dict[str, torch.Tensor] = {
                name: given[name][:, start:stop] for name in ("input_ids", "position_ids") if name in given
            }
            results = executor.run({**step, "attention_mask": mask[:, :stop], **cache})
            pieces.append(results["logits"])
            cache = {name: results[name.replace("past_key_values", "present")] for name in cache}
            start = stop
    decoded, kept = torch.cat(pieces, dim=1), mask.bool()
    assert (decoded - whole)[kept].abs().max() <= 1e-5 * whole[kept].abs().max()
