"""Tiny configs of the decoders with experts that transformers has, made by shrinking its default configs.

The common field names below cover almost all of them; `SPECIAL` holds what a model needs on top. Run as a script
(`python -m tests.frontend.architectures [model_type ...]`), it loads each as moec does and prints what came out.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from moec.errors import UnsupportedModelError
from moec.frontend.huggingface import load_huggingface
from moec.ir import verify
from moec.reference.executor import Executor
from tests.frontend.tiny_models import random_tokens, randomise

LAYERS = 3
BOUND = 1e-4

MODEL_TYPES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "phimoe", "gpt_oss", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "deepseek_v4", "jamba", "granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa",
    "llama4_text", "ernie4_5_moe", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hunyuan_v1_moe", "hy_v3", "hy_v4",
    "minimax", "minimax_m2", "minimax_m3_vl_text", "dbrx", "jetmoe", "afmoe", "aria_text", "axk1", "bailing_hybrid",
    "cohere2_moe", "dots1", "dots3_note_text", "exaone_moe", "flint", "gemma4_text", "inkling_text", "kimi_linear",
    "kolibri1", "laguna", "lfm2_moe", "longcat_flash", "mellum", "mimo_v2_flash", "nemotron_h", "qwen3_5_moe_text",
    "qwen3_next", "solar_open", "zaya",
)  # fmt: skip

# Decoders without experts that the other tests do not cover.
DENSE_MODEL_TYPES = (
    "phi3", "opt", "gpt_neox", "olmo2", "cohere2", "stablelm", "falcon", "bloom", "starcoder2", "glm4", "nemotron",
    "gemma", "granite", "smollm3", "helium",
)  # fmt: skip

_NUMBERS: dict[tuple[str, ...], int] = {
    ("num_hidden_layers", "n_layers", "num_layers"): LAYERS,
    ("vocab_size",): 96,
    ("hidden_size", "d_model", "hidden_dim"): 64,
    ("intermediate_size", "ffn_hidden_size", "intermediate_size_mlp"): 96,
    ("num_attention_heads", "n_heads"): 4,
    ("num_key_value_heads",): 2,
    ("head_dim", "kv_channels", "qk_nope_head_dim", "v_head_dim"): 16,
    ("qk_rope_head_dim",): 8,
    ("q_lora_rank", "kv_lora_rank"): 32,
    ("max_position_embeddings", "max_seq_len"): 4096,
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"): 8,
    (
        "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts",
    ): 2,
    (
        "moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size", "shared_intermediate_size",
    ): 48,
    ("n_shared_experts", "num_shared_experts", "first_k_dense_replace", "num_dense_layers", "topk_group"): 1,
    ("n_group", "num_expert_group"): 2,
    ("sliding_window",): 8,
    ("mamba_d_state", "mamba_d_head", "mamba_head_dim", "ssm_state_size"): 16,
    ("mamba_d_conv",): 4,
    ("mamba_expand",): 2,
    ("mamba_n_heads", "mamba_dt_rank", "mamba_num_heads"): 8,
    ("n_groups", "mamba_n_groups"): 1,
    ("linear_num_value_heads",): 4,
    ("linear_num_key_heads",): 2,
    ("linear_key_head_dim", "linear_value_head_dim"): 16,
    ("index_n_heads",): 12,  # with few heads all of them are often zero, and torch leaves open which of equals it takes
    ("index_head_dim",): 16,
    ("index_topk",): 16,
    ("router_hidden_size",): 16,
    ("moe_layer_start_index",): 0,
    ("moe_layer_end_index",): 2,
    ("moe_layer_interval",): 1,
    ("zero_expert_num",): 2,
    ("hidden_size_per_layer_input",): 0,
    ("pad_token_id",): 0,
    ("bos_token_id",): 1,
    ("eos_token_id",): 2,
}  # fmt: skip
_LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "attn_type_list", "mlp_layer_type", "moe_layers")

# Latent attention has one key head for each query head, and rotates its own width.
_LATENT_ATTENTION = {"num_key_value_heads": 4, "head_dim": 8}
SPECIAL: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "gemma4_text": {"enable_moe_block": True},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "chunk_size": 8},
    "zaya": {"num_experts_per_tok": 1},
}


def small_config(model_type: str) -> PretrainedConfig:
    """The default config of `model_type` with every size made small. Raises what transformers raises for a bad one."""
    defaults = AutoConfig.for_model(model_type).to_dict()
    settings: dict[str, Any] = {}
    for names, number in _NUMBERS.items():
        for name in names:
            if name in defaults and not isinstance(defaults[name], dict | list):
                settings[name] = number
    for name in _LAYER_LISTS:
        kinds = defaults.get(name)
        if isinstance(kinds, list) and kinds and isinstance(kinds[0], str):
            different = list(dict.fromkeys(kinds))
            settings[name] = (different * LAYERS)[:LAYERS]
    if "kv_lora_rank" in defaults and "qk_rope_head_dim" in defaults:
        settings.update((name, value) for name, value in _LATENT_ATTENTION.items() if name in defaults)
    settings.update(SPECIAL.get(model_type, {}))
    return AutoConfig.for_model(model_type, **settings)


def small_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """The float32 model of `small_config`, every parameter and persistent buffer random."""
    config = small_config(model_type)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed)
    return model.eval()


@dataclass(frozen=True)
class Outcome:
    """What became of one architecture: the largest error in shares of the largest logit, or why it was refused."""

    model_type: str
    class_name: str
    error: float = 0.0
    operations: int = 0
    expert_layers: int = 0
    refusal: str = ""

    def row(self) -> str:
        """The line of the table in docs/architectures.md."""
        if self.refusal:
            return f"| {self.model_type} | {self.class_name} | refused | {self.refusal} |"
        experts = f"{self.expert_layers} of {LAYERS} layers `moe.experts`" if self.expert_layers else "no `moe.experts`"
        return f"| {self.model_type} | {self.class_name} | ok | {self.operations} operations, {experts} |"


def load_and_compare(model_type: str, folder: Path) -> Outcome:
    """Saves a small model, loads it as moec does, and compares logits of a left-padded batch with transformers' own."""
    model = small_model(model_type)
    with suppress(ValueError):
        model.set_attn_implementation("eager")
    with suppress(ValueError):
        model.set_experts_implementation("eager")
    name = type(model).__name__
    model.save_pretrained(str(folder))
    try:
        module = load_huggingface(folder)
    except UnsupportedModelError as error:
        return Outcome(model_type, name, refusal=error.message)
    verify(module.op)
    mask = torch.ones(3, 21, dtype=torch.int64)
    mask[0, :6] = 0
    ids = torch.where(mask == 1, random_tokens(3, 21), 0)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    given = {key: value for key, value in given.items() if key in module.main.arg_names}
    with torch.no_grad():
        expected = model(**given).logits[mask.bool()]
        (found,) = Executor(module.op, module.weights).run(given).values()
    counts = module.operation_counts()
    share = float((found[mask.bool()] - expected).abs().max() / expected.abs().max())
    return Outcome(model_type, name, share, sum(counts.values()), counts.get("moe.experts", 0))


def main(model_types: list[str]) -> None:
    """Prints one row of the table for each architecture."""
    for model_type in model_types or MODEL_TYPES:
        with tempfile.TemporaryDirectory() as folder:
            outcome = load_and_compare(model_type, Path(folder))
        print(outcome.row() + ("" if outcome.error <= BOUND else f" WRONG BY {outcome.error}"), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
