"""Tiny models with calibration tokens, and the same sums by hooks on transformers' own model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moec.api import run_passes
from moec.artifact.options import RAISING_PIPELINE
from moec.frontend.huggingface import load_huggingface
from moec.module import Module
from moec.weights.store import WeightStore
from tests.frontend.tiny_models import VOCABULARY_SIZE


def random_sequences(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Token ids without the padding id."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY_SIZE, (length,), generator=generator).tolist() for length in lengths]


def write_tokens(path: Path, sequences: Sequence[Sequence[int]]) -> Path:
    path.write_text(json.dumps(sequences))
    return path


def raised(folder: Path, store: Path | None = None) -> Module:
    """The module of a model folder, with its layers of experts found."""
    module = load_huggingface(folder, None if store is None else WeightStore(store))
    run_passes(module, RAISING_PIPELINE)
    return module


@dataclass
class LayerRows:
    """What one layer of transformers' model did: each a list of tensors, one per sequence."""

    name: str
    module: Any
    router: torch.Tensor
    x: list[torch.Tensor] = field(default_factory=list)
    ids: list[torch.Tensor] = field(default_factory=list)
    gates: list[torch.Tensor] = field(default_factory=list)
    y: list[torch.Tensor] = field(default_factory=list)
    gradient: list[torch.Tensor] = field(default_factory=list)

    def all(self, name: str) -> torch.Tensor:
        return torch.cat(getattr(self, name))

    def hidden(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ self.module.gate_up_proj[expert].T).chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def output(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        return self.hidden(expert, x) @ self.module.down_proj[expert].T


def hooked_run(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[LayerRows]:
    """Runs each sequence alone in float64, with gradients of the sum of the losses in nats."""
    model = model.double().requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    layers: list[LayerRows] = []
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if name.endswith(".experts"):
            rows = LayerRows(name, module, modules[f"{name.removesuffix('.experts')}.gate"].weight)
            layers.append(rows)
            module.register_forward_hook(_note(rows))
    for sequence in sequences:
        ids = torch.tensor([sequence])
        logits = model(input_ids=ids).logits[0].double()
        outputs = [rows.y[-1] for rows in layers]
        if len(sequence) > 1:
            loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
            found = torch.autograd.grad(loss, outputs)
        else:
            found = tuple(torch.zeros_like(output) for output in outputs)
        for rows, gradient in zip(layers, found, strict=True):
            rows.gradient.append(gradient)
            rows.y[-1] = rows.y[-1].detach()
    return layers


def _note(rows: LayerRows) -> Any:
    def hook(module: Any, given: Any, output: torch.Tensor) -> None:
        x, ids, gates = given
        rows.x.append(x.detach())
        rows.ids.append(ids)
        rows.gates.append(gates.detach().double())
        rows.y.append(output)

    return hook
