"""Tiny random checkpoints, saved by transformers itself, of every architecture that the tests compare.

Every parameter and every persistent buffer is random (norm weights, biases, selection biases), so that a tensor which
is dropped, swapped or misread changes the logits.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from moec.frontend.empty_model import EmptyModel, build_empty_model
from moec.frontend.model_config import resolve_model

transformers_logging.disable_progress_bar()

VOCABULARY_SIZE = 96
HIDDEN_SIZE = 64
EXPERT_COUNT = 8


@dataclass(frozen=True)
class TinyModel:
    """What makes a config of one `model_type` tiny. `settings` go on top of `COMMON_SETTINGS`."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    is_encoder: bool = False

    @property
    def is_mixture(self) -> bool:
        return any("expert" in name for name in self.settings)


COMMON_SETTINGS: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

TINY_MODELS: dict[str, TinyModel] = {
    model.model_type: model
    for model in (
        TinyModel("llama", {"tie_word_embeddings": True}),
        TinyModel("mistral", {"sliding_window": 8}),
        TinyModel("qwen2", {"tie_word_embeddings": True}),
        TinyModel("qwen3", {"head_dim": 16}),
        TinyModel(
            "gemma2",
            {
                "head_dim": 16,
                "query_pre_attn_scalar": 24,
                "sliding_window": 8,
                "attn_logit_softcapping": 5.0,
                "final_logit_softcapping": 6.0,
                "tie_word_embeddings": True,
            },
        ),
        TinyModel(
            "gemma3_text",
            {
                "head_dim": 16,
                "query_pre_attn_scalar": 24,
                "sliding_window": 8,
                "num_hidden_layers": 3,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "tie_word_embeddings": True,
            },
        ),
        TinyModel("gpt2", {"n_positions": 256, "tie_word_embeddings": True}),
        TinyModel("bert", {"type_vocab_size": 2}, is_encoder=True),
        TinyModel("mixtral", {"num_local_experts": EXPERT_COUNT, "num_experts_per_tok": 2, "sliding_window": 8}),
        TinyModel(
            "qwen2_moe",
            {
                "num_experts": EXPERT_COUNT,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 48,
                "shared_expert_intermediate_size": 80,
                "decoder_sparse_step": 1,
            },
        ),
        TinyModel(
            "qwen3_moe",
            {
                "num_experts": EXPERT_COUNT,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 48,
                "head_dim": 16,
                "norm_topk_prob": True,
            },
        ),
        TinyModel("olmoe", {"num_experts": EXPERT_COUNT, "num_experts_per_tok": 2}),
        TinyModel("phimoe", {"num_local_experts": EXPERT_COUNT, "num_experts_per_tok": 2, "lm_head_bias": True}),
        TinyModel(
            "granitemoe",
            {
                "num_local_experts": EXPERT_COUNT,
                "num_experts_per_tok": 2,
                "embedding_multiplier": 2.0,
                "attention_multiplier": 0.2,
                "residual_multiplier": 0.7,
                "logits_scaling": 1.5,
                "tie_word_embeddings": True,
            },
        ),
        TinyModel(
            "gpt_oss",
            {
                "num_local_experts": EXPERT_COUNT,
                "num_experts_per_tok": 2,
                "head_dim": 16,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
        TinyModel(
            "deepseek_v2",
            {
                "num_hidden_layers": 3,
                "num_key_value_heads": 4,
                "n_routed_experts": EXPERT_COUNT,
                "num_experts_per_tok": 2,
                "n_shared_experts": 2,
                "moe_intermediate_size": 48,
                "first_k_dense_replace": 1,
                "topk_method": "group_limited_greedy",
                "n_group": 4,
                "topk_group": 2,
                "routed_scaling_factor": 1.5,
                "q_lora_rank": 32,
                "kv_lora_rank": 32,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 16,
                "v_head_dim": 12,
                "head_dim": 8,
            },
        ),
        TinyModel(
            "deepseek_v3",
            {
                "num_hidden_layers": 3,
                "num_key_value_heads": 4,
                "n_routed_experts": EXPERT_COUNT,
                "num_experts_per_tok": 2,
                "n_shared_experts": 1,
                "moe_intermediate_size": 48,
                "first_k_dense_replace": 1,
                "n_group": 4,
                "topk_group": 2,
                "norm_topk_prob": True,
                "routed_scaling_factor": 1.5,
                "q_lora_rank": 32,
                "kv_lora_rank": 32,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 16,
                "v_head_dim": 12,
                "head_dim": 8,
            },
        ),
    )
}

DENSE_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "bert")
MIXTURE_MODEL_TYPES = tuple(name for name in TINY_MODELS if name not in DENSE_MODEL_TYPES)


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """The tiny config of `model_type`, one of `TINY_MODELS`, with `overrides` on top."""
    model = TINY_MODELS[model_type]
    defaults = AutoConfig.for_model(model_type)
    common = {name: value for name, value in COMMON_SETTINGS.items() if hasattr(defaults, name)}
    config = AutoConfig.for_model(model_type, **{**common, **model.settings, **overrides})
    config._attn_implementation = "eager"
    return config


def empty_model(model_type: str, **changes: Any) -> EmptyModel:
    """A tiny decoder without weights, as the frontend builds it."""
    config = tiny_config(model_type, **changes)
    values = json.loads(config.to_json_string(use_diff=False))
    name = AutoModelForCausalLM._model_mapping[type(config)].__name__
    return build_empty_model(resolve_model({**values, "architectures": [name]}, "config.json"))


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """The float32 model of `tiny_config` in eval mode, every parameter and persistent buffer random."""
    config = tiny_config(model_type, **overrides)
    torch.manual_seed(seed)
    if TINY_MODELS[model_type].is_encoder:
        model = AutoModel.from_config(config, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    randomise(model, seed)
    return model.eval()


def save_tiny_checkpoint(model_type: str, folder: str | Path, seed: int = 0, **overrides: Any) -> Path:
    """Writes config.json and model.safetensors of `tiny_model` with transformers' own `save_pretrained`."""
    tiny_model(model_type, seed, **overrides).save_pretrained(str(folder))
    return Path(folder)


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Overwrites every floating parameter and persistent buffer for logits of about 1 to 5 and no idle tensor."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor.dtype)

    stored = set(model.state_dict(keep_vars=True))
    routers = {
        name for name, tensor in model.named_parameters() if tensor.ndim == 2 and tensor.shape[0] == EXPERT_COUNT
    }
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    tensors.update((name, tensor) for name, tensor in model.named_buffers() if name in stored)
    embedding = model.get_input_embeddings().weight if isinstance(model, PreTrainedModel) else None
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    embedding_scale = 0.15 if head is not None and head.weight is embedding else 0.4
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                continue
            if tensor is embedding:
                tensor.copy_(normal(tensor) * embedding_scale)
            elif tensor.ndim == 1 and name.endswith("weight"):
                # Gemma stores the deviation from one and starts at zero: noise around the initial value suits both.
                tensor.copy_(tensor.round() + 0.3 * normal(tensor))
            elif tensor.ndim == 1:
                tensor.copy_(0.2 * normal(tensor))
            elif name in routers:
                tensor.copy_(normal(tensor) * 1.5 / tensor.shape[-1] ** 0.5)
            elif tensor.ndim == 2:
                tensor.copy_(normal(tensor) / max(tensor.shape) ** 0.5)
            elif "bias" in name:
                tensor.copy_(0.2 * normal(tensor))
            else:
                tensor.copy_(normal(tensor) * 2.0 / max(tensor.shape[1:]) ** 0.5)


def random_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids [batch, length] int64 that never contain the padding id 0."""
    return torch.randint(3, VOCABULARY_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))
