"""Layers of the nn dialect in plain torch."""

from __future__ import annotations

import torch

from moec.dialects.nn import AttentionMaskOp, AttentionOp, LayerNormOp, MLPOp, RMSNormOp, RotaryOp
from moec.ir import TensorType
from moec.reference.frame import Frame
from moec.reference.kernels import Kernel, prepares
from moec.reference.plan import plan_block


@prepares(RMSNormOp)
def prepare_rms_norm(op: RMSNormOp) -> Kernel:
    """x / sqrt(mean(x^2) + epsilon) * (weight + offset)."""

    def compute(frame: Frame) -> tuple[torch.Tensor]:
        x = frame.tensor(op.x)
        if op.zero_sum:
            mean = (x.square().sum(-1, keepdim=True) + x.sum(-1, keepdim=True).square()) / (x.shape[-1] + 1)
        else:
            mean = x.square().mean(-1, keepdim=True)
        y = x * torch.rsqrt(mean + op.epsilon)
        weight = frame.optional(op.weight)
        return (y if weight is None else y * (weight + op.offset),)

    return compute


@prepares(LayerNormOp)
def prepare_layer_norm(op: LayerNormOp) -> Kernel:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias."""

    def compute(frame: Frame) -> tuple[torch.Tensor]:
        x = frame.tensor(op.x)
        weight, bias = frame.optional(op.weight), frame.optional(op.bias)
        return (torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, op.epsilon),)

    return compute


@prepares(RotaryOp)
def prepare_rotary(op: RotaryOp) -> Kernel:
    """Rotates the first channels of each head, as `RotaryOp` defines both forms."""

    def compute(frame: Frame) -> tuple[torch.Tensor]:
        x = frame.tensor(op.x)
        cos, sin = frame.tensor(op.cos).unsqueeze(1), frame.tensor(op.sin).unsqueeze(1)
        width = cos.shape[-1]
        turned = x[..., :width]
        if op.interleaved:
            partner = torch.stack([-turned[..., 1::2], turned[..., 0::2]], dim=-1).flatten(-2)
        else:
            first, second = turned.chunk(2, dim=-1)
            partner = torch.cat([-second, first], dim=-1)
        turned = turned * cos + partner * sin
        return (turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], dim=-1),)

    return compute


@prepares(AttentionMaskOp)
def prepare_attention_mask(op: AttentionMaskOp) -> Kernel:
    """Which keys a query may see, [batch, 1, S, T]."""
    kind = op.mask.type
    assert isinstance(kind, TensorType)

    def compute(frame: Frame) -> tuple[torch.Tensor]:
        padding = frame.tensor(op.padding) != 0
        return (attention_mask(padding, frame.size(kind.shape[2]), op.causal, op.window, op.chunk),)

    return compute


def attention_mask(padding: torch.Tensor, queries: int, causal: bool, window: int, chunk: int) -> torch.Tensor:
    """Boolean [batch, 1, queries, T] from boolean `padding` [batch, T], for the last `queries` of T slots."""
    slots = padding.shape[1]
    key = torch.arange(slots)
    query = torch.arange(slots - queries, slots)[:, None]
    allowed = torch.ones(queries, slots, dtype=torch.bool)
    if causal:
        allowed = allowed & (key <= query)
    if window:
        distance = query - key
        allowed = allowed & ((distance if causal else distance.abs()) < window)
    mask = allowed & padding[:, None, :]
    if chunk:
        # transformers counts the tokens in front of the first one that is not padding
        left = (padding.cumsum(1) == 0).sum(1)[:, None, None]
        mask = mask & ((query - left) // chunk == (key - left) // chunk)
    return mask[:, None]


@prepares(AttentionOp)
def prepare_attention(op: AttentionOp) -> Kernel:
    """Attention, and the whole cache where there is one."""

    def compute(frame: Frame) -> list[torch.Tensor]:
        query, key, value = frame.tensor(op.query), frame.tensor(op.key), frame.tensor(op.value)
        present = []
        if op.past_key is not None and op.past_value is not None:
            key = torch.cat([frame.tensor(op.past_key), key], dim=2)
            value = torch.cat([frame.tensor(op.past_value), value], dim=2)
            present = [key, value]
        mask, sinks = frame.optional(op.mask), frame.optional(op.sinks)
        return [attention(query, key, value, mask, sinks, op.scale, op.softcap), *present]

    return compute


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """[batch, S, Hq, Dv] as `AttentionOp` defines it. A query that may see nothing gives zeros."""
    batch, heads, queries, _ = query.shape
    key_heads = key.shape[1]
    grouped = query.reshape(batch, key_heads, heads // key_heads, queries, query.shape[3])
    logits = torch.einsum("bhgsd,bhtd->bhgst", grouped, key).reshape(batch, heads, queries, key.shape[2]) * scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    column = None if sinks is None else sinks.reshape(1, -1, 1, 1).expand(batch, -1, queries, 1)
    scored = logits if column is None else torch.cat([logits, column], dim=-1)
    # A softmax that stays finite, its gradient too, for rows that are masked everywhere.
    top = scored.detach().amax(-1, keepdim=True) if scored.shape[-1] else scored.new_zeros(*scored.shape[:-1], 1)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(scored - top)
    total = weights.sum(-1, keepdim=True)
    weights = weights[..., : key.shape[2]] / torch.where(total > 0, total, 1.0)
    weights = weights.reshape(batch, key_heads, heads // key_heads, queries, key.shape[2])
    output = torch.einsum("bhgst,bhtd->bshgd", weights, value)
    return output.reshape(batch, queries, heads, value.shape[3])


@prepares(MLPOp)
def prepare_mlp(op: MLPOp) -> Kernel:
    """The region on all tokens at once."""
    plan = plan_block(op.regions[0].block)

    def compute(frame: Frame) -> tuple[torch.Tensor]:
        x = frame.tensor(op.x)
        tokens = x.reshape(-1, x.shape[-1])
        # The weights are looked up in the outer frame, where they are loaded one at a time.
        given = [tokens, *(frame.tensor(weight) for weight in op.weights)]
        inner = frame.inner(list(zip(plan.block.arguments, given, strict=True)), tokens.shape[0], None)
        return (plan.run(inner)[0].reshape(x.shape),)

    return compute
