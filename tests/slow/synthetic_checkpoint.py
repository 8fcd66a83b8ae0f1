"""Writes a large Qwen3-MoE checkpoint of random bfloat16 weights, shard by shard, in tens of megabytes of memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class CheckpointSize:
    """The defaults make 8.04 GiB, with so many experts that the target ort-cpu takes its fused operator."""

    layers: int = 32
    hidden_size: int = 1024
    experts: int = 128
    expert_size: int = 336
    heads: int = 16
    key_value_heads: int = 4
    head_size: int = 64
    vocabulary: int = 512
    layers_per_shard: int = 4


def write_checkpoint(folder: Path, size: CheckpointSize = CheckpointSize(), seed: int = 0) -> int:
    """Writes config.json, shards and their index with one tensor per expert and projection. Returns bytes of tensors.

    Every weight is a finite bfloat16 number that is not zero: norms between 1 and 2, all others between 1/128 and 1/32
    in size. All bytes differ from tensor to tensor, so nothing can be stored once for two.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_config(size), indent=2), encoding="utf-8")
    generator = np.random.Generator(np.random.SFC64(seed))
    shards = list(_shards(size))
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        weight_map.update(dict.fromkeys(tensors, name))
        with (folder / name).open("wb") as file:
            total += _write_shard(file, tensors, generator)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _config(size: CheckpointSize) -> dict[str, object]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.expert_size,
        "moe_intermediate_size": size.expert_size,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_value_heads,
        "head_dim": size.head_size,
        "num_experts": size.experts,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _shards(size: CheckpointSize) -> Iterator[dict[str, tuple[int, ...]]]:
    """The shapes of the tensors of each shard by name."""
    hidden, width = size.hidden_size, size.expert_size
    for first in range(0, size.layers, size.layers_per_shard):
        tensors: dict[str, tuple[int, ...]] = {}
        if first == 0:
            tensors["model.embed_tokens.weight"] = (size.vocabulary, hidden)
        for layer in range(first, min(first + size.layers_per_shard, size.layers)):
            prefix = f"model.layers.{layer}"
            attention = f"{prefix}.self_attn"
            tensors[f"{prefix}.input_layernorm.weight"] = (hidden,)
            tensors[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
            tensors[f"{attention}.q_proj.weight"] = (size.heads * size.head_size, hidden)
            tensors[f"{attention}.k_proj.weight"] = (size.key_value_heads * size.head_size, hidden)
            tensors[f"{attention}.v_proj.weight"] = (size.key_value_heads * size.head_size, hidden)
            tensors[f"{attention}.o_proj.weight"] = (hidden, size.heads * size.head_size)
            tensors[f"{attention}.q_norm.weight"] = (size.head_size,)
            tensors[f"{attention}.k_norm.weight"] = (size.head_size,)
            tensors[f"{prefix}.mlp.gate.weight"] = (size.experts, hidden)
            for expert in range(size.experts):
                expert_prefix = f"{prefix}.mlp.experts.{expert}"
                tensors[f"{expert_prefix}.gate_proj.weight"] = (width, hidden)
                tensors[f"{expert_prefix}.up_proj.weight"] = (width, hidden)
                tensors[f"{expert_prefix}.down_proj.weight"] = (hidden, width)
        if first + size.layers_per_shard >= size.layers:
            tensors["model.norm.weight"] = (hidden,)
            tensors["lm_head.weight"] = (size.vocabulary, hidden)
        yield tensors


def _write_shard(file: BinaryIO, tensors: dict[str, tuple[int, ...]], generator: np.random.Generator) -> int:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for shape in tensors.values():
        count = int(np.prod(shape))
        for start in range(0, count, PIECE_BYTES // 2):
            length = min(PIECE_BYTES // 2, count - start)
            bits = np.frombuffer(generator.bytes(2 * length), np.uint16)
            if len(shape) == 1:
                file.write(((bits & 0x007F) | 0x3F80).tobytes())
            else:
                file.write(((bits & 0x80FF) | 0x3C00).tobytes())
    return offset
