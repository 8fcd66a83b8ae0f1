"""Compiles a mixture of experts that you wrote yourself, as a plain torch module, to ONNX.

    python examples/own_module.py OUTPUT_FOLDER

Its block loops over its experts, which torch.export cannot trace. An adapter says where the experts are and computes
the block with `run_experts` instead of the loop; moec checks on the example that both compute the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

import moec
from moec.api import run_passes
from moec.codegen.onnx.emit import emit_onnx
from moec.frontend.experts_adapter import ExpertsAdapter

HIDDEN, EXPERTS, TOP_K, VOCABULARY = 64, 8, 2, 100


class Expert(nn.Module):
    """One expert: two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 128), nn.Linear(128, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


class MyMixture(nn.Module):
    """Each token goes to its best two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, 1)
        gates, ids = self.router(tokens).softmax(dim=-1).topk(TOP_K)
        result = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(ids == index)
            result.index_add_(0, token, expert(tokens[token]) * gates[token, slot, None])
        return result.view(x.shape)


class MyNetwork(nn.Module):
    """An embedding, one mixture and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.norm, self.mixture, self.head = nn.LayerNorm(HIDDEN), MyMixture(), nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        return self.head(x + self.mixture(self.norm(x)))


def traceable_forward(
    block: MyMixture,
    run_experts: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
) -> torch.Tensor:
    """MyMixture.forward with `run_experts` for the loop."""
    tokens = x.flatten(0, 1)
    gates, ids = block.router(tokens).softmax(dim=-1).topk(TOP_K)
    return run_experts(tokens, ids, gates).view(x.shape)


def main(output: Path) -> None:
    """Loads, compiles, runs and compares."""
    torch.manual_seed(0)
    network = MyNetwork()
    module = moec.load(
        network,
        {"ids": torch.randint(0, VOCABULARY, (2, 5))},
        dynamic={"ids": {0: "batch", 1: "seq"}},
        experts=[ExpertsAdapter(MyMixture, lambda block: block.experts, traceable_forward)],
        result_names=["logits"],
    )
    run_passes(module, "canonicalize,cse,raise-nn,raise-moe,canonicalize,dce")
    print(module)
    emit_onnx(module, output)
    ids = torch.randint(0, VOCABULARY, (3, 11))
    session = onnxruntime.InferenceSession(output / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"ids": ids.numpy()})
    with torch.no_grad():
        expected = network(ids).numpy()
    print(f"largest difference {np.abs(logits - expected).max():.1e} of logits up to {np.abs(expected).max():.1f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
