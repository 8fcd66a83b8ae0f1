"""Checkpoints that the tests of the Hugging Face codegen read, edit and write."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from moec.artifact.checkpoint import compare_checkpoint
from moec.artifact.options import RAISING_PIPELINE, CheckpointDType, CheckpointOptions
from moec.artifact.tokens import token_batch
from moec.codegen.huggingface.emit import HuggingFaceReport, emit_huggingface
from moec.dialects.builtin import ModuleOp
from moec.experts import Dense, FeedForward, LowRank, MoeLayer, Projection, find_moe_layers, load_expert
from moec.frontend.huggingface import load_huggingface
from moec.module import Module
from moec.pipeline.manager import PassManager, Pipeline
from moec.weights.store import WeightStore

BOUND = 5e-6
"""Relative difference between logits of transformers and of the reference executor, both in float32."""


@dataclass(frozen=True)
class Source:
    """A checkpoint folder, loaded: as it was traced, and raised."""

    folder: Path
    traced: Module
    raised: Module

    def edited(self) -> Module:
        """A copy of the raised module that a test may change."""
        return copy_of(self.raised)


def load_source(folder: Path, store: Path) -> Source:
    """Loads and raises a checkpoint folder."""
    traced = load_huggingface(folder, WeightStore(store))
    raised = copy_of(traced)
    PassManager(Pipeline.parse(RAISING_PIPELINE)).run(raised.op, weights=raised.weights, module=raised)
    return Source(folder, traced, raised)


def copy_of(module: Module) -> Module:
    """The same model, whose IR may be changed."""
    clone = module.op.clone()
    assert isinstance(clone, ModuleOp)
    return Module(clone, module.weights, module.source)


def write(
    source: Source,
    module: Module,
    out: Path,
    *,
    uniform: bool = False,
    dtype: CheckpointDType = CheckpointDType.AUTO,
    shard_bytes: int = 1 << 30,
) -> HuggingFaceReport:
    """Writes `module` to `out`."""
    return emit_huggingface(module, out, CheckpointOptions(uniform, dtype, shard_bytes), original=source.traced)


def difference(folder: Path, module: Module, dtype: CheckpointDType = CheckpointDType.AUTO) -> float:
    """How far the logits of `from_pretrained` are from the IR's, relative to the largest."""
    (row,) = compare_checkpoint(folder, module, token_batch(module, rows=2, length=24), dtype)
    assert "transformers" in row.comparison and row.ties == 0
    return row.relative_difference


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def layers(module: Module) -> tuple[MoeLayer, ...]:
    """The layers with experts."""
    return find_moe_layers(module.op)


def experts_of(layer: MoeLayer, module: Module) -> dict[int, FeedForward]:
    """All stored experts of a layer."""
    found: dict[int, FeedForward] = {}
    for number in range(layer.expert_count):
        expert = load_expert(layer, module.weights, number)
        assert isinstance(expert, FeedForward)
        found[number] = expert
    return found


def narrowed(expert: FeedForward, width: int) -> FeedForward:
    """The expert with its first `width` neurons."""

    def rows(projection: Projection | None) -> Projection | None:
        if projection is None:
            return None
        bias = None if projection.bias is None else projection.bias[:width].clone()
        return Projection(Dense(projection.dense()[:width].clone()), bias)

    up = rows(expert.up)
    assert up is not None
    down = Projection(Dense(expert.down.dense()[:, :width].clone()), expert.down.bias)
    return FeedForward(expert.activation, rows(expert.gate), up, down)


def factored(expert: FeedForward, rank: int) -> FeedForward:
    """The expert with its up projection as a product of two thin matrices."""
    left, values, right = torch.linalg.svd(expert.up.dense(), full_matrices=False)
    matrix = LowRank((left[:, :rank] * values[:rank]).contiguous(), right[:rank].contiguous())
    return replace(expert, up=Projection(matrix, expert.up.bias), loaded=())
