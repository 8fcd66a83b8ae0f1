"""raise-nn on layers as people write them, each compared with what was traced in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.passes.raising import Raised, raise_all

WIDTH, HEADS = 32, 4
HIDDEN = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1))


def reasons(raised: Raised) -> str:
    return " ".join(refusal.reason for refusal in raised.refusals)


class Norm(nn.Module):
    """x in, a norm of it out; the spelling is a function of x, weight and bias."""

    def __init__(self, spelling: Callable[..., torch.Tensor]) -> None:
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
    "weight behind": lambda x, w, b: (x * torch.rsqrt(mean_square(x) + 1e-6)) * w,
    "casts": lambda x, w, b: (x.float() * torch.rsqrt(mean_square(x.float()) + 1e-6)).to(x.dtype) * w,
    "product": lambda x, w, b: x * torch.rsqrt((x * x).mean(-1, True) + 1e-6) * w,
    "division": lambda x, w, b: x / torch.sqrt(mean_square(x) + 1e-6) * w,
    "power": lambda x, w, b: x * torch.pow(mean_square(x) + 1e-6, -0.5) * w,
    "reciprocal": lambda x, w, b: x * torch.sqrt(mean_square(x) + 1e-6).reciprocal() * w,
    "view of the weight": lambda x, w, b: x * torch.rsqrt(mean_square(x) + 1e-6) * w.view(1, 1, -1),
    "torch": lambda x, w, b: functional.rms_norm(x, (WIDTH,), w, 1e-6),
}
LAYER_NORMS = {
    "torch": lambda x, w, b: functional.layer_norm(x, (WIDTH,), w, b, 1e-6),
    "mean of squares": lambda x, w, b: centred(x) * torch.rsqrt(mean_square(centred(x)) + 1e-6) * w + b,
    "variance": lambda x, w, b: centred(x) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-6) * w + b,
    "bias first": lambda x, w, b: b + w * (centred(x) * torch.rsqrt(mean_square(centred(x)) + 1e-6)),
}


def normed_twice(x, w, b):
    normed = x * torch.rsqrt(mean_square(x) + 1e-6)
    return normed * w + normed


OTHER_NORMS = {
    "offset": lambda x, w, b: x * torch.rsqrt(mean_square(x) + 1e-6) * (1.0 + w),
    "default epsilon": lambda x, w, b: functional.rms_norm(x, (WIDTH,)),
    "used twice": normed_twice,
    "sum": lambda x, w, b: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6) * w,
    "other axis": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * w,
    "other input": lambda x, w, b: x * torch.rsqrt((x + 1.0).pow(2).mean(-1, keepdim=True) + 1e-6) * w,
    "two axes": lambda x, w, b: functional.rms_norm(x.view(-1, 4, WIDTH // 4), (4, WIDTH // 4)).view(x.shape) * w,
    "unbiased": lambda x, w, b: centred(x) / torch.sqrt(x.var(-1, keepdim=True) + 1e-6) * w,
}


@cache
def norms() -> dict[tuple[str, str], Raised]:
    groups = {"rms": RMS_NORMS, "layer": LAYER_NORMS, "other": OTHER_NORMS}
    parts = {(group, name): Norm(one) for group, spellings in groups.items() for name, one in spellings.items()}
    return raise_all(parts, HIDDEN)


@pytest.mark.parametrize("name", RMS_NORMS)
def test_rms_norm(name: str) -> None:
    raised = norms()["rms", name]
    (norm,) = raised.named("nn.rms_norm")
    assert norm.weight is not None and norm.epsilon == 1e-6 and norm.offset == 0.0
    assert raised.names() == {"aten.mul.Scalar", "moec.weight", "nn.rms_norm"}
    assert raised.error < 1e-12


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_layer_norm(name: str) -> None:
    raised = norms()["layer", name]
    (norm,) = raised.named("nn.layer_norm")
    assert norm.weight is not None and norm.bias is not None and norm.epsilon == 1e-6
    assert raised.names() == {"aten.mul.Scalar", "moec.weight", "nn.layer_norm"}
    assert raised.error < 1e-12


def test_rms_norm_with_an_offset_weight() -> None:
    """Gemma stores the deviation of the weight from one."""
    raised = norms()["other", "offset"]
    (norm,) = raised.named("nn.rms_norm")
    assert norm.offset == 1.0 and norm.weight.defining_op.name == "moec.weight"
    assert raised.error < 1e-12


def test_rms_norm_without_weight_and_epsilon() -> None:
    raised = norms()["other", "default epsilon"]
    (norm,) = raised.named("nn.rms_norm")
    assert norm.weight is None and norm.epsilon == torch.finfo(torch.float32).eps
    assert raised.error < 1e-12


def test_norm_that_is_used_without_its_weight_keeps_the_product() -> None:
    raised = norms()["other", "used twice"]
    assert len(raised.named("nn.rms_norm")) == len(raised.named("aten.mul.Tensor")) == 1
    assert raised.error < 1e-12


@pytest.mark.parametrize("name", ["sum", "other axis", "other input", "two axes", "unbiased"])
def test_what_is_no_norm(name: str) -> None:
    raised = norms()["other", name]
    assert not raised.named("nn.rms_norm") and not raised.named("nn.layer_norm")
    assert raised.error < 1e-12


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


def backwards(x, angles, channels):
    return x * repeated(angles).cos() - rotate_half(x) * repeated(angles).sin()


@cache
def rotaries() -> dict[str, Raised]:
    parts = {name: Rotary(spelling, channels) for name, (spelling, channels, _) in ROTARIES.items()}
    return raise_all({**parts, "backwards": Rotary(backwards, 8)}, HIDDEN)


@pytest.mark.parametrize("name", ROTARIES)
def test_rotary(name: str) -> None:
    raised = rotaries()[name]
    _, channels, in_interleaved_pairs = ROTARIES[name]
    (rotary,) = raised.named("nn.rotary")
    assert rotary.interleaved is in_interleaved_pairs
    assert rotary.cos.type.shape[-1] == channels
    assert not raised.named("aten.neg.default")
    assert raised.error < 1e-12


def test_partial_rotary_is_one_operation() -> None:
    (rotary,) = rotaries()["partial"].named("nn.rotary")
    assert rotary.x.type.shape[-1] == WIDTH // HEADS
    assert not [op for op in rotaries()["partial"].named("aten.cat.default") if op.result.type == rotary.y.type]


def test_turning_backwards_is_no_rotary() -> None:
    assert not rotaries()["backwards"].named("nn.rotary")
    assert rotaries()["backwards"].error < 1e-12


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
    "repeat_interleave": (
        lambda q, k, v: softmax(scores(q, k.repeat_interleave(2, dim=1)) * 0.3) @ v.repeat_interleave(2, dim=1),
        2,
    ),
}


def leaking(q, k, v):
    return softmax((scores(q, k) * 0.3).masked_fill(~causal(q), -10.0)) @ v


def scaled_late(q, k, v):
    return softmax((scores(q, k) + causal(q).float()) * 0.3) @ v


def without_keys(q, k, v):
    allowed = causal(q) & (torch.arange(q.shape[2]) > 1)[:, None]
    return softmax((scores(q, k) * 0.3).masked_fill(~allowed, torch.finfo(torch.float32).min)) @ v


@cache
def attentions() -> dict[str, Raised]:
    parts = {name: Attention(*given) for name, given in ATTENTIONS.items()}
    others = {"leaking": leaking, "scaled late": scaled_late, "without keys": without_keys}
    return raise_all({**parts, **{name: Attention(one) for name, one in others.items()}}, HIDDEN)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name: str) -> None:
    raised = attentions()[name]
    (attention,) = raised.named("nn.attention")
    assert attention.key.type.shape[1] == ATTENTIONS[name][1]
    assert not raised.named("aten.softmax.int") and not raised.named("aten.matmul.default")
    # one for each of query, key and value: the attention gives heads behind tokens, as the view wants them
    assert len(raised.named("aten.permute.default")) == 3
    assert raised.error < 1e-12


def test_query_that_sees_no_key_keeps_the_average_of_a_finite_fill() -> None:
    raised = attentions()["without keys"]
    assert len(raised.named("nn.attention")) == 1
    assert raised.error < 1e-12


@pytest.mark.parametrize(("name", "reason"), [("leaking", "become -10.0"), ("scaled late", "not from q k^T")])
def test_attention_that_cannot_be_said_is_refused(name: str, reason: str) -> None:
    raised = attentions()[name]
    assert not raised.named("nn.attention")
    assert reason in reasons(raised)
    assert raised.error < 1e-12


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


def gelu_tanh(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_erf(x):
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


# Each is the one operation of the body that is no projection.
ACTIVATIONS = {
    "silu": (lambda x: x * torch.sigmoid(x), "aten.silu.default", {}),
    "gelu": (gelu_erf, "aten.gelu.default", {}),
    "gelu, tanh": (gelu_tanh, "aten.gelu.default", {"approximate": "tanh"}),
}
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


def used_elsewhere(m, x):
    inside = functional.silu(m.up(x))
    return m.down(inside) + inside.sum()


OTHER_BLOCKS = {
    "no activation": lambda m, x: m.down(m.up(x)),
    "used elsewhere": used_elsewhere,
    "gate of another input": lambda m, x: m.down(functional.silu(m.gate(x.cos())) * m.up(x)),
}


@cache
def feed_forwards() -> dict[str, Raised]:
    parts = {name: FeedForward(spelling, bias) for name, (spelling, bias, _) in FEED_FORWARDS.items()}
    parts.update((name, FeedForward(one)) for name, one in OTHER_BLOCKS.items())
    for name, (activation, _, _) in ACTIVATIONS.items():
        parts[name] = FeedForward(lambda m, x, activation=activation: m.down(activation(m.up(x))))
    return raise_all(parts, HIDDEN)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_that_is_written_out(name: str) -> None:
    raised = feed_forwards()[name]
    (mlp,) = raised.named("nn.mlp")
    _, kind, arguments = ACTIVATIONS[name]
    _, activation, _, _ = mlp.regions[0].block
    assert activation.name == kind
    assert arguments.items() <= activation.attributes.items()
    assert raised.error < 1e-12


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_mlp(name: str) -> None:
    raised = feed_forwards()[name]
    (mlp,) = raised.named("nn.mlp")
    assert len(mlp.weights) == FEED_FORWARDS[name][2]
    assert not raised.named("aten.linear.default") and not raised.named("aten.matmul.default")
    assert raised.error < 1e-12


@pytest.mark.parametrize("name", OTHER_BLOCKS)
def test_what_is_no_mlp(name: str) -> None:
    raised = feed_forwards()[name]
    assert not raised.named("nn.mlp")
    assert raised.error < 1e-12


def test_mlp_whose_inside_is_used_elsewhere_is_explained() -> None:
    assert "used outside" in reasons(feed_forwards()["used elsewhere"])
