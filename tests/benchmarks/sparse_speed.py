"""Speed of a dense model that became one of experts: `python -m tests.benchmarks.sparse_speed`.

A Llama decoder of 4 layers (hidden 1024, width 4096, vocabulary 256) is compiled as it is, as 8 experts of which a
token chooses 4 or 2, for both targets, and with a share of the neurons for each token (`sparsify-ffn`). Each round runs
each artifact once, on fresh tokens; times are CPU seconds of the measuring thread, ratios are of medians in one run.
The experts' own share is told from that of attention by a decoder with next to no feed-forward block.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.benchmarks.layer_speed import Call, load_onnx
from tests.benchmarks.machine import cpu_seconds

LAYERS, HIDDEN, WIDTH, VOCABULARY, EXPERTS = 4, 1024, 4096, 256, 8
CHOICES = (4, 2)
TOKEN_COUNTS = (1, 16, 128, 512)
TARGETS = ("portable", "ort-cpu")
DENSE, NO_MLP = "dense", "without feed-forward"
NEURONS = {
    "best 25 % of neurons": "sparsify-ffn{keep=0.25}",
    "best 8 % of neurons": "sparsify-ffn{keep=0.08}",
}
"""Pipelines for the target ort-cpu."""


@dataclass
class SparseTimes:
    """Seconds per call by (subject, tokens), all rounds."""

    seconds: dict[tuple[str, int], list[float]] = field(default_factory=dict)

    def median(self, subject: str, tokens: int) -> float:
        return statistics.median(self.seconds[subject, tokens])

    def speed_up(self, subject: str, tokens: int) -> float:
        """How many times faster than the dense model."""
        return self.median(DENSE, tokens) / self.median(subject, tokens)

    def block_speed_up(self, subject: str, tokens: int) -> float:
        """The same of the feed-forward blocks alone."""
        rest = self.median(NO_MLP, tokens)
        return (self.median(DENSE, tokens) - rest) / (self.median(subject, tokens) - rest)


def subject_name(k: int, target: str) -> str:
    """How the table calls a sparse artifact."""
    return f"{k} of {EXPERTS} experts, {target}"


def make_artifacts(folder: Path) -> dict[str, Path]:
    """The ONNX file of each subject, compiled where `folder` has none."""
    torch.manual_seed(0)
    sources = {}
    for name, width in ((DENSE, WIDTH), (NO_MLP, 8)):
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=16,
            num_key_value_heads=16,
            max_position_embeddings=2048,
            intermediate_size=width,
        )
        sources[name] = folder / f"source {name}"
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(sources[name])
    models = {name: _compile(source, folder / name, []) for name, source in sources.items()}
    for target in TARGETS:
        for k in CHOICES:
            pipeline = (
                f"factorize{{experts={EXPERTS} partition=contiguous}},init-router{{kind=random}},set-routing{{k={k}}}"
            )
            name = subject_name(k, target)
            models[name] = _compile(sources[DENSE], folder / name, ["--target", target, "--pipeline", pipeline])
    for name, pipeline in NEURONS.items():
        models[name] = _compile(sources[DENSE], folder / name, ["--target", "ort-cpu", "--pipeline", pipeline])
    return models


def _compile(source: Path, output: Path, options: list[str]) -> Path:
    model = output / "onnx" / "model.onnx"
    if model.is_file():
        return model
    command = ["compile", str(source), "-o", str(output), "--check", "none", "--no-verify", *options]
    store = ["--store", str(output.parent / "store")]
    subprocess.run([sys.executable, "-m", "moec", *command, *store], check=True, stdout=subprocess.DEVNULL)
    return model


def measure(folder: Path, rounds: int) -> SparseTimes:
    """Makes the artifacts in `folder` and runs `rounds` rounds after one to warm up."""
    calls: dict[str, Call] = {name: load_onnx(path) for name, path in make_artifacts(folder).items()}
    times = SparseTimes()
    generator = np.random.default_rng(0)
    for round_number in range(-1, rounds):
        for tokens in TOKEN_COUNTS:
            for name, call in calls.items():
                ids = generator.integers(0, VOCABULARY, (1, tokens))
                seconds = cpu_seconds(lambda call=call, ids=ids: call(ids))
                if round_number >= 0:
                    times.seconds.setdefault((name, tokens), []).append(seconds)
    return times


def table(times: SparseTimes) -> str:
    """Medians, and ratios to the dense model, as text."""
    subjects = list(dict.fromkeys(name for name, _ in times.seconds))
    header = "".join(f"{f'{tokens} tokens':>12}" for tokens in TOKEN_COUNTS)
    lines = [f"{'milliseconds per call':34}{header}"]
    for name in subjects:
        lines.append(f"{name:34}" + "".join(f"{times.median(name, tokens) * 1e3:12.2f}" for tokens in TOKEN_COUNTS))
    lines.append(f"{'times faster than dense':34}{header}")
    for name in subjects:
        if name not in (DENSE, NO_MLP):
            lines.append(f"{name:34}" + "".join(f"{times.speed_up(name, tokens):12.2f}" for tokens in TOKEN_COUNTS))
    lines.append(f"{'feed-forward blocks alone':34}{header}")
    for name in subjects:
        if name not in (DENSE, NO_MLP):
            cells = "".join(f"{times.block_speed_up(name, tokens):12.2f}" for tokens in TOKEN_COUNTS)
            lines.append(f"{name:34}{cells}")
    return "\n".join(lines)


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(description="Speed of a dense model as experts, one thread.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--artifacts", type=Path, help="where artifacts are kept for another run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(table(measure(arguments.artifacts or Path(scratch), arguments.rounds)))


if __name__ == "__main__":
    main()
