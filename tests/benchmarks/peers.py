"""Exports a checkpoint with transformers' own ONNX exporter, to compare with: `python -m tests.benchmarks.peers`.

It needs onnxscript, which is in the extra `dev`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

KINDS = ("plain", "fused", "all-experts")
SECONDS_FILE = "seconds.json"


def all_experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Every expert on every token, most of it times zero: how exporters that cannot select write a layer.

    `hidden_states` [tokens, hidden], `top_k_index` and `top_k_weights` [tokens, k]; returns [tokens, hidden].
    """
    shape = (hidden_states.shape[0], self.gate_up_proj.shape[0])
    gates = torch.zeros(shape, dtype=hidden_states.dtype).scatter_add(1, top_k_index, top_k_weights)
    gate, up = torch.matmul(hidden_states[None], self.gate_up_proj.transpose(1, 2)).chunk(2, -1)
    outputs = torch.matmul(self.act_fn(gate) * up, self.down_proj.transpose(1, 2))
    return (outputs * gates.t()[:, :, None]).sum(0)


def export(checkpoint: Path, output: Path, kind: str) -> float:
    """Writes model.onnx into `output`; returns the CPU seconds of export and writing, loading the model not counted."""
    ALL_EXPERTS_FUNCTIONS.register("all_experts", all_experts)
    implementation = "all_experts" if kind == "all-experts" else "grouped_mm"
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, experts_implementation=implementation, use_cache=False
    ).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 12))
    start = time.process_time()
    exported = OnnxExporter().export(
        model,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        config=OnnxConfig(dynamic=True, ort_fusions="cpu" if kind == "fused" else None),
    )
    exported.save_pretrained(output)
    return time.process_time() - start


def main() -> None:
    """Reads the command line and exports; seconds.json beside the model says how long it took."""
    parser = argparse.ArgumentParser(description="Export a checkpoint with transformers' own ONNX exporter.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="plain")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seconds = export(arguments.checkpoint, arguments.output, arguments.kind)
    (arguments.output / SECONDS_FILE).write_text(json.dumps({"cpu_seconds": seconds}), encoding="utf-8")


if __name__ == "__main__":
    main()
