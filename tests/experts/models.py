"""Tiny checkpoints with experts, loaded and raised, whose layers tests edit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from moec.artifact.options import RAISING_PIPELINE
from moec.artifact.tokens import function_inputs, token_batch
from moec.dialects.builtin import ModuleOp
from moec.frontend.huggingface import load_huggingface
from moec.ir import verify
from moec.module import Module
from moec.pipeline.manager import PassManager, Pipeline
from moec.reference.executor import Executor
from moec.weights.store import WeightStore
from tests.frontend.tiny_models import VOCABULARY_SIZE, save_tiny_checkpoint


def raised_model(model_type: str, folder: Path, *, stored: torch.dtype = torch.float32, **overrides: object) -> Module:
    """A tiny random checkpoint of `model_type`, its tensors `stored`, as a raised module with a store in `folder`."""
    save_tiny_checkpoint(model_type, folder, **overrides)
    store_as(stored, folder)
    module = load_huggingface(folder, WeightStore(folder / "store"))
    PassManager(Pipeline.parse(RAISING_PIPELINE)).run(module.op, weights=module.weights, module=module)
    return module


def store_as(dtype: torch.dtype, folder: Path) -> None:
    """Rounds the tensors of a checkpoint in one float32 file to another element type."""
    if dtype is not torch.float32:
        file = folder / "model.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def calibrate_text(folder: Path, rows: int = 8, length: int = 32, options: str = "") -> str:
    """Pipeline text that calibrates on random tokens, which are written to `folder`."""
    path = folder / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, VOCABULARY_SIZE, (rows, length)))
    return f"calibrate{{tokens={path} sequences={rows} length={length} {options}}}"


def copy_of(module: Module) -> Module:
    """The same model with its calibration, whose IR may be changed."""
    clone = module.op.clone()
    assert isinstance(clone, ModuleOp)
    copy = Module(clone, module.weights, module.source)
    copy.calibration = module.calibration
    return copy


def output(module: Module, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The logits for 2 x 24 fixed tokens, one row padded; verifies the IR first."""
    verify(module.op)
    batch = token_batch(module, rows=2, length=24)
    with torch.no_grad():
        results = Executor(module.op, module.weights, dtype=dtype).run(function_inputs(module.main, batch))
    return next(iter(results.values()))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference relative to the largest value of `one`."""
    return float((one - other).abs().max() / one.abs().max())
