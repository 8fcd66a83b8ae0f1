"""Inputs for a module of a language model, and what transformers computes from the same tokens."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from moec.artifact.tokens import TokenBatch, function_inputs
from moec.module import Module


def inputs_of(module: Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """All inputs of `main` for token ids and padding mask, i64 [batch, seq]."""
    return function_inputs(module.main, TokenBatch(ids.numpy(), mask.numpy()))


def transformers_output(model: PreTrainedModel, module: Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits, or hidden states of an encoder; positions are counted as the module's inputs count them."""
    given = inputs_of(module, ids, mask)
    with torch.no_grad():
        result = model(**given)
    output = result.logits if module.source.kind == "decoder" else result.last_hidden_state
    assert isinstance(output, torch.Tensor)
    return output
