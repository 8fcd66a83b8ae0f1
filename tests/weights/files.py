"""Writes safetensors files byte by byte, well formed or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_bytes(header: object, data: bytes = b"") -> bytes:
    """A file with `header` as JSON (or as it is, if it is bytes) and `data`."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def one_tensor(name: str = "weight", data: bytes = bytes(8), **changes: Any) -> bytes:
    """A file with one float32 tensor of two elements, its entry changed as asked."""
    return file_bytes({name: {**ENTRY, **changes}}, data)


def save_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]], index: dict[str, str] | None = None) -> None:
    """Shards and an index; `index` overrides which shard each tensor is said to be in."""
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": index or weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
