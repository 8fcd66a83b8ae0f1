"""Several tiny models of one shape as one source."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PhiConfig, PhiForCausalLM

import moec
from moec.artifact.options import RAISING_PIPELINE
from moec.dialects.builtin import ModuleOp
from moec.frontend.huggingface import load_huggingface
from moec.module import Module
from moec.weights.store import WeightStore
from tests.experts.models import store_as
from tests.frontend.tiny_models import VOCABULARY_SIZE, randomise, save_tiny_checkpoint


def like(first: Path, folder: Path, seed: int, only: tuple[str, ...] = ("",)) -> Path:
    """A copy of a checkpoint with other weights, where their names contain one of `only`."""
    shutil.copytree(first, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(first / "model.safetensors")
    for name in [name for name in tensors if any(part in name for part in only)]:
        tensor = tensors[name]
        tensors[name] = (tensor + 0.05 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_tiny_phi(folder: Path) -> Path:
    """A model of parallel blocks, whose attention and feed-forward block read one norm; with biases everywhere."""
    config = PhiConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model = PhiForCausalLM(config)
    randomise(model, 0)
    model.save_pretrained(str(folder))
    return folder


def several(
    model_type: str, folder: Path, *, equal: bool, only: tuple[str, ...] = ("",), dtype: torch.dtype = torch.float32
) -> Module:
    """A raised module with two models beside it."""
    first = (
        save_tiny_phi(folder / "first") if model_type == "phi" else save_tiny_checkpoint(model_type, folder / "first")
    )
    store_as(dtype, first)
    others = [first, first] if equal else [like(first, folder / str(seed), seed, only) for seed in (1, 2)]
    module = load_huggingface(first, WeightStore(folder / "store"), others)
    moec.run_passes(module, RAISING_PIPELINE)
    return module


def changed(source: Module, pipeline: str, seed: int = 0, calibration: Path | None = None) -> Module:
    """The module with its other models, after a pipeline."""
    clone = source.op.clone()
    assert isinstance(clone, ModuleOp)
    module = Module(clone, source.weights, source.source, others=source.others)
    moec.run_passes(module, pipeline, seed=seed, calibration=calibration)
    return module
