"""raise-nn on layers as people write them, each compared with what was traced in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.passes.raising import raised

WIDTH, HEADS = 32, 4
HIDDEN = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1))


class Norm(nn.Module):
    """x in, a norm of it out; the spelling is a function of x, weight and bias."""

    def __init__(self, spelling) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.bias = nn.Parameter(torch.zeros(WIDTH))
        self.spelling = spelling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.spelling(x, self.weight, self.bias)


def mean_square(x: torch.Tensor) -> torch.Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def centred(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(-1, keepdim=True)


RMS_NORMS = {
    "llama": lambda x, w, b: w * (x * torch.rsqrt(mean_square(x) + 1e-6)),
    "weight first": lambda x, w, b: (x * torch.rsqrt(mean_square(x) + 1e-6)) * w,
    "casts": lambda x, w, b: (x.float() * torch.rsqrt(mean_square(x.float()) + 1e-6)).to(x.dtype) * w,
    "product": lambda x, w, b: x * torch.rsqrt((x * x).mean(-1, True) + 1e-6) * w,
    "division": lambda x, w, b: x / torch.sqrt(mean_square(x) + 1e-6) * w,
    "power": lambda x, w, b: x * torch.pow(mean_square(x) + 1e-6, -0.5) * w,
    "reciprocal": lambda x, w, b: x * torch.sqrt(mean_square(x) + 1e-6).reciprocal() * w,
    "view of the weight": lambda x, w, b: x * torch.rsqrt(mean_square(x) + 1e-6) * w.view(1, 1, -1),
    "torch": lambda x, w, b: functional.rms_norm(x, (WIDTH,), w, 1e-6),
}


@pytest.mark.parametrize("spelling", RMS_NORMS.values(), ids=RMS_NORMS)
def test_rms_norm(spelling) -> None:
    module, _ = raised(Norm(spelling), x=HIDDEN)
    (norm,) = [op for op in module.main.body if op.name == "nn.rms_norm"]
    assert norm.weight is not None and norm.epsilon == 1e-6 and norm.offset == 0.0
    assert module.operation_counts().keys() == {"builtin.module", "func.func", "moec.weight", norm.name, "func.return"}


def test_rms_norm_with_an_offset_weight() -> None:
    """Gemma stores the deviation of the weight from one."""
    module, _ = raised(Norm(lambda x, w, b: x * torch.rsqrt(mean_square(x) + 1e-6) * (1.0 + w)), x=HIDDEN)
    (norm,) = [op for op in module.main.body if op.name == "nn.rms_norm"]
    assert norm.offset == 1.0 and norm.weight.defining_op.name == "moec.weight"


def test_rms_norm_without_weight_and_default_epsilon() -> None:
    module, _ = raised(Norm(lambda x, w, b: functional.rms_norm(x, (WIDTH,))), x=HIDDEN)
    (norm,) = [op for op in module.main.body if op.name == "nn.rms_norm"]
    assert norm.weight is None and norm.epsilon == torch.finfo(torch.float32).eps


def test_norm_whose_plain_result_is_used_keeps_the_product() -> None:
    def both(x, w, b):
        normed = x * torch.rsqrt(mean_square(x) + 1e-6)
        return normed * w + normed

    module, _ = raised(Norm(both), x=HIDDEN)
    assert module.operation_counts()["nn.rms_norm"] == module.operation_counts()["aten.mul.Tensor"] == 1


@pytest.mark.parametrize(
    "spelling",
    [
        lambda x, w, b: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6) * w,
        lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * w,
        lambda x, w, b: x * torch.rsqrt((x + 1.0).pow(2).mean(-1, keepdim=True) + 1e-6) * w,
        lambda x, w, b: functional.rms_norm(x.view(-1, 4, WIDTH // 4), (4, WIDTH // 4)).view(x.shape) * w,
    ],
    ids=["sum", "other axis", "other input", "two axes"],
)
def test_no_rms_norm(spelling) -> None:
    module, _ = raised(Norm(spelling), x=HIDDEN)
    assert "nn.rms_norm" not in module.operation_counts()


LAYER_NORMS = {
    "torch": lambda x, w, b: functional.layer_norm(x, (WIDTH,), w, b, 1e-6),
    "mean of squares": lambda x, w, b: centred(x) * torch.rsqrt(mean_square(centred(x)) + 1e-6) * w + b,
    "variance": lambda x, w, b: centred(x) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-6) * w + b,
    "bias first": lambda x, w, b: b + w * (centred(x) * torch.rsqrt(mean_square(centred(x)) + 1e-6)),
}


@pytest.mark.parametrize("spelling", LAYER_NORMS.values(), ids=LAYER_NORMS)
def test_layer_norm(spelling) -> None:
    module, _ = raised(Norm(spelling), x=HIDDEN)
    (norm,) = [op for op in module.main.body if op.name == "nn.layer_norm"]
    assert norm.weight is not None and norm.bias is not None and norm.epsilon == 1e-6
    assert module.operation_counts().keys() == {"builtin.module", "func.func", "moec.weight", norm.name, "func.return"}


def test_unbiased_variance_is_no_layer_norm() -> None:
    module, _ = raised(Norm(lambda x, w, b: centred(x) / torch.sqrt(x.var(-1, keepdim=True) + 1e-6) * w), x=HIDDEN)
    assert "nn.layer_norm" not in module.operation_counts()


# -- rotary embeddings --------------------


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate_pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def turn_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def turn_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, whole_halves: bool) -> torch.Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    results = (even * cos - odd * sin, even * sin + odd * cos)
    return torch.cat(results, -1) if whole_halves else torch.stack(results, -1).flatten(-2)


def turn_complex(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    turned = numbers * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(3)


class Rotary(nn.Module):
    """x [batch, seq, width] is split into heads, rotated, and put together again."""

    def __init__(self, spelling, channels: int) -> None:
        super().__init__()
        self.spelling, self.channels = spelling, channels
        self.frequencies = nn.Parameter(10.0 ** -torch.linspace(0, 2, channels // 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.view(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)
        angles = torch.arange(x.shape[1]).float()[None, :, None] * self.frequencies
        return self.spelling(heads, angles.expand(x.shape[0], -1, -1), self.channels)


def repeated(angles: torch.Tensor) -> torch.Tensor:
    return torch.cat((angles, angles), -1)[:, None]


def in_pairs(angles: torch.Tensor) -> torch.Tensor:
    return angles.repeat_interleave(2, -1)[:, None]


def plain(x, angles, channels):
    return x * repeated(angles).cos() + rotate_half(x) * repeated(angles).sin()


def partial(x, angles, channels):
    return torch.cat((plain(x[..., :channels], angles, channels), x[..., channels:]), -1)


def behind(x, angles, channels):
    return torch.cat((x[..., channels:], plain(x[..., :channels], angles, channels)), -1)


def heads_last(x, angles, channels):
    x = x.transpose(1, 2)
    angles = torch.cat((angles, angles), -1)[:, :, None]
    return x * angles.cos() + rotate_half(x) * angles.sin()


def interleaved(x, angles, channels):
    return x * in_pairs(angles).cos() + rotate_pairs(x) * in_pairs(angles).sin()


ROTARIES = {
    "half split": (plain, 8, False),
    "partial": (partial, 4, False),
    "behind other channels": (behind, 4, False),
    "heads last": (heads_last, 8, False),
    "halves with one cosine each": (lambda x, a, c: turn_halves(x, a.cos()[:, None], a.sin()[:, None]), 8, False),
    "interleaved": (interleaved, 8, True),
    "pairs to pairs": (lambda x, a, c: turn_pairs(x, a.cos()[:, None], a.sin()[:, None], False), 8, True),
    "pairs to halves": (lambda x, a, c: turn_pairs(x, a.cos()[:, None], a.sin()[:, None], True), 8, False),
    "complex": (lambda x, a, c: turn_complex(x, a[:, None]), 8, True),
}


@pytest.mark.parametrize(("spelling", "channels", "in_interleaved_pairs"), ROTARIES.values(), ids=ROTARIES)
def test_rotary(spelling, channels: int, in_interleaved_pairs: bool) -> None:
    module, _ = raised(Rotary(spelling, channels), x=HIDDEN)
    (rotary,) = [op for op in module.main.body if op.name == "nn.rotary"]
    assert rotary.interleaved is in_interleaved_pairs
    assert rotary.cos.type.shape[-1] == channels
    assert "aten.neg.default" not in module.operation_counts()


def test_partial_rotary_is_one_operation() -> None:
    module, _ = raised(Rotary(partial, 4), x=HIDDEN)
    (rotary,) = [op for op in module.main.body if op.name == "nn.rotary"]
    assert rotary.x.type.shape[-1] == 8 and rotary.y.type == module.main.return_op.operands[0].type


def test_turning_backwards_is_no_rotary() -> None:
    def backwards(x, angles, channels):
        return x * repeated(angles).cos() - rotate_half(x) * repeated(angles).sin()

    module, _ = raised(Rotary(backwards, 8), x=HIDDEN)
    assert "nn.rotary" not in module.operation_counts()


# -- attention --------------------


class Attention(nn.Module):
    """Self-attention with projections; the spelling is a function of query, key and value [batch, heads, seq, D]."""

    def __init__(self, spelling, key_heads: int = HEADS) -> None:
        super().__init__()
        self.spelling, self.key_heads = spelling, key_heads
        width = WIDTH // HEADS * key_heads
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key, self.value = nn.Linear(WIDTH, width), nn.Linear(WIDTH, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length = x.shape[:2]
        query = self.query(x).view(batch, length, HEADS, -1).transpose(1, 2)
        key = self.key(x).view(batch, length, self.key_heads, -1).transpose(1, 2)
        value = self.value(x).view(batch, length, self.key_heads, -1).transpose(1, 2)
        out = self.spelling(query, key, value)
        return self.out(out.transpose(1, 2).reshape(batch, length, -1))


def scores(query, key):
    return query @ key.transpose(-2, -1)


def causal(query):
    return torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()


def repeat(x, times: int = 2):
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, times, length, width).reshape(batch, heads * times, length, width)


def softmax(x):
    return torch.softmax(x, dim=-1)


ATTENTIONS = {
    "torch": (lambda q, k, v: functional.scaled_dot_product_attention(q, k, v), HEADS),
    "torch, causal": (lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True), HEADS),
    "torch, scaled": (lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, scale=0.2), HEADS),
    "torch, mask": (lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, causal(q)), HEADS),
    "torch, grouped": (
        lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        2,
    ),
    "torch, repeated": (
        lambda q, k, v: functional.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True),
        2,
    ),
    "plain": (lambda q, k, v: softmax(scores(q, k) / math.sqrt(8)) @ v, HEADS),
    "masked_fill": (
        lambda q, k, v: softmax((scores(q, k) * 0.3).masked_fill(~causal(q), float("-inf"))) @ v,
        HEADS,
    ),
    "where": (
        lambda q, k, v: softmax(torch.where(causal(q), scores(q, k), torch.finfo(torch.float32).min)) @ v,
        HEADS,
    ),
    "added mask": (lambda q, k, v: softmax(scores(q, k) * 0.3 + (~causal(q)).float() * -1e9) @ v, HEADS),
    "softcap": (lambda q, k, v: softmax(5.0 * torch.tanh(scores(q, k) * 0.3 / 5.0)) @ v, HEADS),
    "repeated": (lambda q, k, v: softmax(scores(q, repeat(k)) * 0.3) @ repeat(v), 2),
}


@pytest.mark.parametrize(("spelling", "key_heads"), ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention(spelling, key_heads: int) -> None:
    module, context = raised(Attention(spelling, key_heads), x=HIDDEN)
    (attention,) = [op for op in module.main.body if op.name == "nn.attention"]
    assert attention.key.type.shape[1] == key_heads
    counts = module.operation_counts()
    assert "aten.softmax.int" not in counts and "aten.expand.default" not in counts
    # one for each of query, key and value: the attention gives heads behind tokens, as the view wants them
    assert counts["aten.permute.default"] == 3
    assert not [refusal for refusal in context.refusals if refusal.operation == "aten.matmul.default"]


def test_query_that_sees_no_key_keeps_the_average_of_a_finite_fill() -> None:
    def hidden(q, k, v):
        allowed = causal(q) & (torch.arange(q.shape[2]) > 1)[:, None]
        return softmax((scores(q, k) * 0.3).masked_fill(~allowed, torch.finfo(torch.float32).min)) @ v

    module, _ = raised(Attention(hidden), x=HIDDEN)
    assert module.operation_counts()["nn.attention"] == 1


def test_attention_that_leaks_through_its_mask_is_refused() -> None:
    def leaking(q, k, v):
        return softmax((scores(q, k) * 0.3).masked_fill(~causal(q), -10.0)) @ v

    module, context = raised(Attention(leaking), x=HIDDEN)
    assert "nn.attention" not in module.operation_counts()
    assert any("-10.0" in refusal.reason for refusal in context.refusals)


def test_scale_behind_the_mask_is_refused() -> None:
    def late(q, k, v):
        return softmax((scores(q, k) + causal(q).float()) * 0.3) @ v

    module, context = raised(Attention(late), x=HIDDEN)
    assert "nn.attention" not in module.operation_counts()
    assert any("not from q k^T" in refusal.reason for refusal in context.refusals)


# -- feed-forward blocks --------------------


class FeedForward(nn.Module):
    def __init__(self, spelling, bias: bool = False, out: int = WIDTH) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 48, bias), nn.Linear(WIDTH, 48, bias)
        self.both, self.down = nn.Linear(WIDTH, 96, bias), nn.Linear(48, out, bias)
        self.slope = nn.Parameter(torch.ones(48))
        self.spelling = spelling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.spelling(self, x)


def fused(m, x):
    gate, up = m.both(x).chunk(2, -1)
    return m.down(functional.gelu(gate, approximate="tanh") * up)


FEED_FORWARDS = {
    "gated": (lambda m, x: m.down(functional.silu(m.gate(x)) * m.up(x)), False, 3),
    "gated with biases": (lambda m, x: m.down(functional.silu(m.gate(x)) * m.up(x)), True, 6),
    "one projection for both": (fused, False, 2),
    "plain": (lambda m, x: m.down(functional.gelu(m.up(x))), True, 4),
    "squared relu": (lambda m, x: m.down(functional.relu(m.up(x)).square()), False, 2),
    "matrix product": (lambda m, x: functional.relu(x @ m.up.weight.T) @ m.down.weight.T, False, 2),
    "learned slope": (lambda m, x: m.down(torch.tanh(m.up(x)) * m.slope), False, 3),
    "on flat tokens": (lambda m, x: m.down(functional.silu(m.up(x.view(-1, WIDTH)))).view(x.shape), False, 2),
}


@pytest.mark.parametrize(("spelling", "bias", "weights"), FEED_FORWARDS.values(), ids=FEED_FORWARDS)
def test_mlp(spelling, bias: bool, weights: int) -> None:
    module, _ = raised(FeedForward(spelling, bias), x=HIDDEN)
    (mlp,) = [op for op in module.main.body if op.name == "nn.mlp"]
    assert len(mlp.weights) == weights
    assert not any(op.name == "aten.linear.default" for op in module.main.body)


def test_projections_without_activation_are_no_mlp() -> None:
    module, _ = raised(FeedForward(lambda m, x: m.down(m.up(x))), x=HIDDEN)
    assert "nn.mlp" not in module.operation_counts()


def test_mlp_whose_inside_is_used_elsewhere_is_refused() -> None:
    def leaking(m, x):
        inside = functional.silu(m.up(x))
        return m.down(inside) + inside.sum()

    module, context = raised(FeedForward(leaking), x=HIDDEN)
    assert "nn.mlp" not in module.operation_counts()
    assert any("used outside" in refusal.reason for refusal in context.refusals)


def test_gate_of_another_input_is_no_mlp() -> None:
    module, _ = raised(FeedForward(lambda m, x: m.down(functional.silu(m.gate(x.cos())) * m.up(x))), x=HIDDEN)
    assert "nn.mlp" not in module.operation_counts()
