"""The operations that stand for attention, masks and experts in a trace, and their registration with transformers.

transformers dispatches attention, mask creation and expert computation through three registries. While
`dispatching_to_hooks` is open, each of them gives a single opaque operation, so that every architecture traces to the
same few nodes:

- `moec::attention_mask(padding [B, T] bool, q_length, causal, window, chunk) -> [B, 1, S, T] bool` (True = attend)
- `moec::unsupported_mask(padding, q_length, reason)`: a mask that the first cannot express; an error only if used
- `moec::attention(query [B, Hq, S, D], key [B, Hk, T, D], value [B, Hk, T, Dv], mask?, sinks? [Hq], scale, softcap)
  -> [B, S, Hq, Dv]`
- `moec::experts(x [T, H], ids [T, K], gates [T, K], weights [E, ...]..., body) -> [T, H]`

The CPU implementations are written for checking a trace, not for speed.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moec.errors import UnsupportedModelError
from moec.frontend.expert_body import body_of, stacked_parameters
from moec.frontend.mask_pattern import AttentionMaskPattern, probe_mask_function

EXPERTS_HOOK = "moec"
BODY_ATTRIBUTE = "_moec_expert_body"

# Arguments of an attention function that change nothing in evaluation mode or that the mask already contains.
_HARMLESS_ARGUMENTS = frozenset(
    {"dropout", "sliding_window", "position_ids", "output_attentions", "use_cache", "training"}
)


@torch.library.custom_op("moec::attention_mask", mutates_args=())
def attention_mask(padding: torch.Tensor, q_length: int, causal: bool, window: int, chunk: int) -> torch.Tensor:
    """[B, 1, S, T] bool from padding [B, T]; `window` and `chunk` as in AttentionMaskPattern."""
    positions = torch.arange(padding.shape[1])
    left_padding = (padding.cumsum(1) == 0).sum(1)[:, None, None]
    pattern = AttentionMaskPattern(causal, window, chunk)
    allowed = pattern.allows(positions[None, -q_length:, None], positions[None, None, :], left_padding)
    return (allowed & padding.to(torch.bool)[:, None, :])[:, None]


@attention_mask.register_fake
def _(padding: torch.Tensor, q_length: int, causal: bool, window: int, chunk: int) -> torch.Tensor:
    return padding.new_empty((padding.shape[0], 1, q_length, padding.shape[1]), dtype=torch.bool)


@torch.library.custom_op("moec::unsupported_mask", mutates_args=())
def unsupported_mask(padding: torch.Tensor, q_length: int, reason: str) -> torch.Tensor:
    """Stands for a mask [B, 1, S, T] that was refused. Models create masks that none of their layers use."""
    raise UnsupportedModelError(reason)


@unsupported_mask.register_fake
def _(padding: torch.Tensor, q_length: int, reason: str) -> torch.Tensor:
    return padding.new_empty((padding.shape[0], 1, q_length, padding.shape[1]), dtype=torch.bool)


@torch.library.custom_op("moec::attention", mutates_args=())
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """[B, S, Hq, Dv]. A boolean mask forbids where False, a floating one is added. Rows that see nothing give zeros."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column.to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2).contiguous()


@attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))


@torch.library.custom_op("moec::experts", mutates_args=())
def experts(
    x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, weights: list[torch.Tensor], body: str
) -> torch.Tensor:
    """Sum over k of gates[t, k] * expert ids[t, k] applied to x[t]; ids beyond the stacks contribute nothing."""
    result = torch.zeros_like(x)
    for expert in range(weights[0].shape[0]):
        token, slot = torch.where(ids == expert)
        if token.numel():
            computed = body_of(body).run(x[token], [stack[expert] for stack in weights])
            result.index_add_(0, token, (computed * gates[token, slot, None]).to(x.dtype))
    return result


@experts.register_fake
def _(x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, weights: list[torch.Tensor], body: str) -> torch.Tensor:
    return torch.empty_like(x)


@contextmanager
def dispatching_to_hooks() -> Iterator[None]:
    """While open, transformers' registries give the operations of this module.

    They stand in for "sdpa" because models ask for that name before they combine boolean masks with masks of their own.
    Models that write their attention out ask for the additive masks of "eager", and get them.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    entries = (
        (ALL_EXPERTS_FUNCTIONS, EXPERTS_HOOK, _experts_hook),
        (ALL_MASK_ATTENTION_FUNCTIONS, "sdpa", _mask_hook),
        (ALL_MASK_ATTENTION_FUNCTIONS, "eager", _additive_mask_hook),
        (ALL_ATTENTION_FUNCTIONS, "sdpa", _attention_hook),
    )
    before = [registry._local_mapping.get(name) for registry, name, _ in entries]
    for registry, name, hook in entries:
        registry[name] = hook
    try:
        yield
    finally:
        for (registry, name, _), old in zip(entries, before, strict=True):
            if old is None:
                del registry[name]
            else:
                registry[name] = old


def _mask_hook(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> torch.Tensor:
    padding = attention_mask
    if padding is None:
        padding = torch.ones((batch_size, kv_length), dtype=torch.int64, device=device)
    if isinstance(q_offset, torch.Tensor) or q_offset != 0 or kv_offset != 0:
        raise UnsupportedModelError("the attention mask starts at an offset although the trace uses no cache")
    try:
        pattern = AttentionMaskPattern(causal=True) if mask_function is None else probe_mask_function(mask_function)
    except UnsupportedModelError as error:
        refused: torch.Tensor = torch.ops.moec.unsupported_mask(padding, q_length, str(error))
        return refused
    mask: torch.Tensor = torch.ops.moec.attention_mask(padding, q_length, pattern.causal, pattern.window, pattern.chunk)
    return mask


def _additive_mask_hook(dtype: torch.dtype = torch.float32, **arguments: Any) -> torch.Tensor:
    mask = _mask_hook(**arguments)
    return torch.where(mask, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


def _attention_hook(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    _refuse_unknown_arguments(module, others)
    mask = attention_mask
    if mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        if causal or others.get("sliding_window"):
            ones = torch.ones((query.shape[0], key.shape[2]), dtype=torch.int64, device=query.device)
            window = int(others.get("sliding_window") or 0)
            mask = torch.ops.moec.attention_mask(ones, query.shape[2], bool(causal), window, 0)
    if position_bias is not None:
        mask = position_bias if mask is None else _add_bias(position_bias, mask)
    # Some eager attention functions take the sinks from the module.
    sinks = s_aux if s_aux is not None else getattr(module, "sinks", None)
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    return torch.ops.moec.attention(query, key, value, mask, sinks, scale, float(softcap or 0.0)), None


def _add_bias(bias: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, bias, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else mask + bias


def _refuse_unknown_arguments(module: nn.Module, arguments: dict[str, Any]) -> None:
    """What the model's own eager attention names in its signature has a meaning that must not be lost."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        return
    named = inspect.signature(eager).parameters
    for name, value in arguments.items():
        if value is not None and name in named and name not in _HARMLESS_ARGUMENTS:
            raise UnsupportedModelError(
                f"the attention takes an argument {name!r} that moec does not know",
                where=f"{type(module).__module__}.{type(module).__name__}",
            )


def _experts_hook(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    body = getattr(module, BODY_ATTRIBUTE, None)
    if not isinstance(body, str):
        raise UnsupportedModelError(
            "an expert block was reached whose body was not traced", where=type(module).__name__
        )
    weights = [parameter for _, parameter in stacked_parameters(module)]
    result: torch.Tensor = torch.ops.moec.experts(hidden_states, top_k_index, top_k_weights, weights, body)
    return result
