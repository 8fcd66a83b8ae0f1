"""Expert blocks of transformers that loop over their experts instead of asking the registry.

They share the registry's interface, `forward(hidden_states, top_k_index, top_k_weights)`, and are told apart by the
parameters they hold. Each gets a forward that calls `moec::experts` and is otherwise what its loop computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from moec.frontend.expert_body import is_stacked_experts, trace_expert

_INTERFACE = ("hidden_states", "top_k_index", "top_k_weights")

_Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def replace_expert_loops(model: nn.Module) -> None:
    """Gives every block that is known here its forward; others stay, and fail to trace if they loop."""
    for name, module in model.named_modules():
        if is_stacked_experts(module) or tuple(inspect.signature(module.forward).parameters) != _INTERFACE:
            continue
        held = {parameter for parameter, _ in module.named_parameters()}
        if held == {"mlp.w1", "mlp.v1", "mlp.w2"}:
            module.forward = _flat_stacks(module, name)
        elif held == {"gate_up_proj", "down_proj"} and hasattr(module, "identity_expert"):
            module.forward = _with_identity_experts(module, name)


def _flat_stacks(module: Any, where: str) -> _Forward:
    """DBRX: all experts' rows in one matrix [experts * width, hidden], `mlp(x, w1, v1, w2)` computes one."""
    experts, width, hidden = module.num_experts, module.ffn_hidden_size, module.hidden_size
    stacks = [(name, torch.Size((width, hidden))) for name in ("w1", "v1", "w2")]
    body = trace_expert(module.mlp.forward, stacks, hidden, where).digest

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        weights = [getattr(module.mlp, name).view(experts, width, hidden) for name, _ in stacks]
        tokens = hidden_states.reshape(-1, hidden)
        result: torch.Tensor = torch.ops.moec.experts(tokens, top_k_index, top_k_weights, weights, body)
        return result.view(hidden_states.shape)

    return forward


def _with_identity_experts(module: Any, where: str) -> _Forward:
    """LongCat: router outputs beyond the experts give their token back, scaled by the gate."""
    count = module.num_routed_experts

    def one_expert(tokens: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        gate, up = functional.linear(tokens, gate_up).chunk(2, dim=-1)
        return functional.linear(module.act_fn(gate) * up, down)

    stacks = [(name, getattr(module, name).shape[1:]) for name in ("gate_up_proj", "down_proj")]
    body = trace_expert(one_expert, stacks, module.hidden_size, where).digest

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        is_identity = top_k_index >= count
        zero = torch.zeros_like(top_k_weights)
        ids = torch.where(is_identity, torch.zeros_like(top_k_index), top_k_index)
        gates = torch.where(is_identity, zero, top_k_weights)
        # the checkpoint holds unused rows for the identity experts
        weights = [getattr(module, name)[:count] for name, _ in stacks]
        result: torch.Tensor = torch.ops.moec.experts(hidden_states, ids, gates, weights, body)
        kept = torch.where(is_identity, top_k_weights, zero).sum(dim=-1, keepdim=True)
        return result + hidden_states * kept

    return forward
