"""Masks, attention, rotary embeddings and norms against transformers and torch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import masking_utils
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere_rotary
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm_rotary
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary

from moec.dialects.builtin import FuncOp, ModuleOp
from moec.dialects.nn import AttentionOp, LayerNormOp, RMSNormOp, RotaryOp
from moec.ir import Operation, TensorType, symbol
from moec.reference.executor import Executor
from moec.reference.nn_kernels import attention, attention_mask
from tests.ir.build import f32

PADDING = torch.tensor([[1] * 11, [0] * 3 + [1] * 8, [0] * 9 + [1] * 2])

PATTERNS: dict[str, tuple[Callable[[torch.Tensor], Any], bool, int, int]] = {
    "causal": (lambda left: masking_utils.causal_mask_function, True, 0, 0),
    "bidirectional": (lambda left: masking_utils.bidirectional_mask_function, False, 0, 0),
    "window": (lambda left: masking_utils.sliding_window_causal_mask_function(3), True, 3, 0),
    "both sides": (
        # transformers counts the reach to each side, a window of w slots reaches w - 1
        lambda left: masking_utils.sliding_window_bidirectional_mask_function(2),
        False,
        3,
        0,
    ),
    "chunk": (lambda left: masking_utils.chunked_causal_mask_function(4, left), True, 0, 4),
}


@pytest.mark.parametrize("queries", [11, 3, 1])
@pytest.mark.parametrize("name", PATTERNS)
def test_masks_equal_those_of_transformers(name: str, queries: int) -> None:
    """Left-padded rows, whole sequences and the last slots of a longer one."""
    function, causal, window, chunk = PATTERNS[name]
    left = (PADDING.cumsum(-1) == 0).sum(-1)
    expected = masking_utils.eager_mask(
        batch_size=3,
        q_length=queries,
        kv_length=11,
        q_offset=11 - queries,
        mask_function=function(left),
        attention_mask=PADDING.bool(),
    )
    ours = attention_mask(PADDING.bool(), queries, causal, window, chunk)
    assert torch.equal(ours, expected == 0)


def _heads(key_heads: int = 2, width: int = 8, value_width: int = 8, slots: int = 11) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4, 11, width), (3, key_heads, slots, width), (3, key_heads, slots, value_width)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize(("key_heads", "value_width"), [(4, 8), (2, 5), (1, 8)])
def test_attention_equals_torch(key_heads: int, value_width: int) -> None:
    query, key, value = _heads(key_heads, value_width=value_width)
    mask = attention_mask(PADDING.bool(), 11, True, 0, 0)
    additive = torch.randn(3, 4, 11, 11, dtype=torch.float64)
    rows = mask.any(-1, keepdim=True)
    for given in (None, mask, additive):
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=given, scale=0.3, enable_gqa=True
        )
        ours = attention(query, key, value, given, None, 0.3)
        expected = (expected if given is not mask else torch.where(rows, expected, 0.0)).transpose(1, 2)
        assert torch.allclose(ours, expected, atol=1e-12)


@pytest.mark.parametrize("name", PATTERNS)
def test_sinks_and_softcap_equal_transformers(name: str) -> None:
    _, causal, window, chunk = PATTERNS[name]
    query, key, value = _heads()
    mask = attention_mask(PADDING.bool(), 11, causal, window, chunk)
    float_mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    sinks = torch.randn(4, dtype=torch.float64)
    module = SimpleNamespace(num_key_value_groups=2, sinks=sinks, training=False, head_dim=8)
    seen = mask.any(-1)[:, 0]
    expected, _ = gpt_oss_attention(module, query, key, value, float_mask, scaling=0.4)
    ours = attention(query, key, value, mask, sinks, 0.4)
    assert torch.allclose(ours[seen], expected[seen], atol=1e-12)
    expected, _ = gemma2_attention(module, query, key, value, float_mask, scaling=0.4, softcap=1.5)
    ours = attention(query, key, value, mask, None, 0.4, 1.5)
    # gemma2 takes its softmax in float32
    assert torch.allclose(ours[seen], expected[seen], atol=1e-6)


def test_rows_that_see_nothing_are_finite_in_value_and_gradient() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in _heads())
    mask = torch.zeros(3, 1, 11, 11, dtype=torch.bool)
    mask[0] = True
    for given in (mask, torch.where(mask, 0.0, -torch.inf).double()):
        output = attention(query, key, value, given, None, 0.3)
        assert bool(output[1:].eq(0).all()) and bool(output.isfinite().all())
        for gradient in torch.autograd.grad(output.square().sum(), (query, key, value)):
            assert bool(gradient.isfinite().all())


def test_attention_gradients() -> None:
    query, key, value = (tensor[:1, :, :3].clone().requires_grad_() for tensor in _heads())
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    mask = attention_mask(torch.tensor([[0, 1, 1]]).bool(), 3, True, 0, 0)

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
        return attention(query, key, value, mask, sinks, 0.3, 2.0)

    assert torch.autograd.gradcheck(run, (query, key, value, sinks))


def _run(op_of: Callable[..., Operation], *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Runs one operation built on arguments of the given shapes, their first two sizes symbolic."""
    names = [f"a{index}" for index in range(len(tensors))]
    function = FuncOp.build("main", [f32(*tensor.shape) for tensor in tensors], arg_names=names)
    op = op_of(*function.arguments)
    function.body.append(op)
    function.finish(op.results, [f"r{index}" for index in range(len(op.results))])
    executor = Executor(ModuleOp.build([function]), {}, dtype=tensors[0].dtype)
    return list(executor.run(dict(zip(names, tensors, strict=True))).values())


def test_attention_through_a_cache_equals_attention_at_once() -> None:
    query, key, value = _heads()
    mask = attention_mask(PADDING.bool(), 11, True, 4, 0)
    whole = attention(query, key, value, mask, None, 0.3)
    cut = 6

    def with_cache(query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Operation:
        return AttentionOp(query, key, value, None, None, past_key, past_value, scale=0.3)

    tail = [tensor[:, :, cut:] for tensor in (query, key, value)]
    _, present_key, present_value = _run(with_cache, *tail, key[:, :, :cut], value[:, :, :cut])
    assert torch.equal(present_key, key) and torch.equal(present_value, value)
    later = attention(query[:, :, cut:], present_key, present_value, mask[:, :, cut:], None, 0.3)
    assert torch.allclose(later, whole[:, cut:], atol=1e-12)


@pytest.mark.parametrize("rotated", [8, 4])
def test_rotary_forms_equal_transformers(rotated: int) -> None:
    x, other, _ = _heads(key_heads=4)
    angles = torch.randn(3, 11, rotated // 2, dtype=torch.float64)
    half = torch.cat([angles, angles], dim=-1)
    (ours,) = _run(lambda *v: RotaryOp(*v), x, half.cos(), half.sin())
    expected, _ = llama_rotary(x[..., :rotated], other[..., :rotated], half.cos(), half.sin())
    assert torch.allclose(ours, torch.cat([expected, x[..., rotated:]], -1), atol=1e-12)

    doubled = angles.repeat_interleave(2, dim=-1)
    (ours,) = _run(lambda *v: RotaryOp(*v, interleaved=True), x, doubled.cos(), doubled.sin())
    expected, _ = cohere_rotary(x[..., :rotated], other[..., :rotated], doubled.cos(), doubled.sin())
    assert torch.allclose(ours, torch.cat([expected, x[..., rotated:]], -1), atol=1e-6)
    # glm rotates half of the channels and brings its angles in the other order
    expected, _ = glm_rotary(x, other, half.cos(), half.sin())
    assert torch.allclose(ours, expected, atol=1e-12)


def test_norms_equal_transformers_and_torch() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 5, 16), torch.randn(16), torch.randn(16)
    llama, gemma = LlamaRMSNorm(16, 1e-5), Gemma2RMSNorm(16, 1e-5)
    llama.weight.data, gemma.weight.data = weight, weight
    with torch.no_grad():
        (ours,) = _run(lambda *v: RMSNormOp(*v, epsilon=1e-5), x, weight)
        assert torch.allclose(ours, llama(x), atol=1e-6)
        (ours,) = _run(lambda *v: RMSNormOp(*v, epsilon=1e-5, offset=1.0), x, weight)
        assert torch.allclose(ours, gemma(x), atol=1e-6)
        (ours,) = _run(lambda v: RMSNormOp(v, epsilon=1e-5), x)
        assert torch.allclose(ours * weight, llama(x), atol=1e-6)
        (ours,) = _run(lambda *v: LayerNormOp(*v, epsilon=1e-5), x, weight, bias)
        assert torch.allclose(ours, torch.nn.functional.layer_norm(x, (16,), weight, bias, 1e-5), atol=1e-6)


def test_mask_of_a_symbolic_length() -> None:
    from moec.dialects.nn import AttentionMaskOp
    from moec.ir import DType

    batch, seq, past = symbol("batch"), symbol("seq"), symbol("past")
    padding = TensorType((batch, past + seq), DType.I64)
    ids = TensorType((batch, seq), DType.I64)
    function = FuncOp.build("main", [ids, padding], arg_names=["input_ids", "attention_mask"])
    kind = TensorType((batch, 1, seq, past + seq), DType.I1)
    mask = AttentionMaskOp(function.arguments[1], result_types=[kind], causal=True, window=3)
    function.body.append(mask)
    function.finish([mask.mask], ["mask"])
    found = Executor(ModuleOp.build([function]), {}).run(
        {"input_ids": torch.zeros(3, 2, dtype=torch.int64), "attention_mask": PADDING}
    )
    assert torch.equal(found["mask"], attention_mask(PADDING.bool(), 2, True, 3, 0))
