"""Speed of compiled experts beside everything they could be compared with: `python -m tests.benchmarks.layer_speed`.

A Mixtral decoder of 4 layers (hidden 1024, 32 experts of width 1408, top-4, vocabulary 256) runs on one thread as
- the artifact of moec, for both targets;
- the artifact of moec for a dense decoder of the same active FLOPs, and for one with next to no feed-forward block, so
  that the experts' own share can be told from that of attention;
- transformers' own ONNX export, plain and fused for the CPU, and an export in which every expert computes every token;
- transformers in torch with `grouped_mm`.
Each round runs each subject once, on tokens that no round before has seen, and measures the machine again. Times are
CPU seconds of the measuring thread, so that other work on the machine disturbs them little; the table shows medians.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from tests.benchmarks.machine import MachineLimits, cpu_seconds
from tests.benchmarks.peers import SECONDS_FILE

LAYERS, HIDDEN, WIDTH, EXPERTS, TOP_K, VOCABULARY = 4, 1024, 1408, 32, 4, 256
TOKEN_COUNTS = (1, 16, 128, 512)

PORTABLE, ORT_CPU = "moec portable", "moec ort-cpu"
DENSE, NO_MLP = "moec dense, equal FLOPs", "moec without experts"
EXPORT, FUSED_EXPORT, ALL_EXPERTS = "transformers export", "transformers export, fused", "all experts"
TORCH = "torch grouped_mm"

Call = Callable[[NDArray[np.int64]], object]


@dataclass
class Measured:
    """Seconds per call by (subject, tokens), all rounds; CPU seconds of making each artifact; the machine's limits."""

    seconds: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    making: dict[str, float] = field(default_factory=dict)
    limits: MachineLimits = field(default_factory=MachineLimits)

    def median(self, subject: str, tokens: int) -> float:
        return statistics.median(self.seconds[subject, tokens])

    def experts_only(self, subject: str, tokens: int) -> float:
        """Seconds without those of a decoder that has no experts."""
        return self.median(subject, tokens) - self.median(NO_MLP, tokens)

    @property
    def decode_bound(self) -> float:
        """Seconds in which the weights that one token needs can be read."""
        return active_bytes() / self.limits.bytes_per_second


def active_bytes() -> int:
    """Bytes of the float32 weights that one token reads: attention, router, its experts, the head."""
    per_layer = 4 * HIDDEN * HIDDEN + EXPERTS * HIDDEN + TOP_K * 3 * HIDDEN * WIDTH
    return 4 * (LAYERS * per_layer + VOCABULARY * HIDDEN)


def write_checkpoints(folder: Path) -> dict[str, Path]:
    """Writes the decoder with experts, the dense one and the one without, in float32; returns their folders."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 16,
        "num_key_value_heads": 16, "max_position_embeddings": 2048,
    }  # fmt: skip
    configs = {
        "experts": MixtralConfig(
            **common, intermediate_size=WIDTH, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K, sliding_window=None
        ),
        DENSE: LlamaConfig(**common, intermediate_size=WIDTH * TOP_K),
        NO_MLP: LlamaConfig(**common, intermediate_size=8),
    }
    torch.manual_seed(0)
    folders = {}
    for name, config in configs.items():
        folders[name] = folder / f"checkpoint {name}"
        if not folders[name].is_dir():
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folders[name])
    return folders


def make_artifacts(folder: Path, measured: Measured, subjects: tuple[str, ...]) -> dict[str, Path]:
    """Makes what is not in `folder` yet; returns the ONNX file of each subject that has one."""
    checkpoints = write_checkpoints(folder)
    moec = {
        PORTABLE: (checkpoints["experts"], "portable"),
        ORT_CPU: (checkpoints["experts"], "ort-cpu"),
        DENSE: (checkpoints[DENSE], "portable"),
        NO_MLP: (checkpoints[NO_MLP], "portable"),
    }
    models = {}
    for name, (checkpoint, target) in moec.items():
        output = folder / name
        if name not in subjects:
            continue
        models[name] = output / "onnx" / "model.onnx"
        if not output.is_dir():
            command = ["moec", "compile", str(checkpoint), "-o", str(output), "--target", target]
            measured.making[name] = _run([sys.executable, "-m", *command])
    for name, kind in ((EXPORT, "plain"), (FUSED_EXPORT, "fused"), (ALL_EXPERTS, "all-experts")):
        output = folder / name
        if name not in subjects:
            continue
        models[name] = output / "model.onnx"
        if not output.is_dir():
            command = ["tests.benchmarks.peers", str(checkpoints["experts"]), str(output), "--kind", kind]
            _run([sys.executable, "-m", *command])
        measured.making[name] = json.loads((output / SECONDS_FILE).read_text(encoding="utf-8"))["cpu_seconds"]
    return models


def _run(command: list[str]) -> float:
    """Runs a command; returns its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def load_onnx(path: Path) -> Call:
    """A call that runs the ONNX model on tokens [1, length] int64 with an empty cache, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = {item.name: item for item in session.get_inputs()}
    caches = {
        name: np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32)
        for name, item in inputs.items()
        if name.startswith("past_key_values.")
    }

    def call(ids: NDArray[np.int64]) -> object:
        feed: dict[str, Any] = {"input_ids": ids, **caches}
        if "attention_mask" in inputs:
            feed["attention_mask"] = np.ones_like(ids)
        if "position_ids" in inputs:
            feed["position_ids"] = np.arange(ids.shape[1])[None]
        return session.run(["logits"], feed)[0]

    return call


def load_torch(checkpoint: Path) -> Call:
    """A call that runs the checkpoint in transformers with the grouped product."""
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, experts_implementation="grouped_mm", use_cache=False
    ).eval()

    def call(ids: NDArray[np.int64]) -> object:
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(ids)).logits.numpy()

    return call


def measure(folder: Path, rounds: int, subjects: tuple[str, ...]) -> Measured:
    """Makes the artifacts in `folder`, checks that all of them compute the same, and runs `rounds` rounds."""
    measured = Measured()
    models = make_artifacts(folder, measured, subjects)
    torch.set_num_threads(1)
    calls = {name: load_onnx(path) for name, path in models.items()}
    if TORCH in subjects:
        calls[TORCH] = load_torch(folder / "checkpoint experts")
    generator = np.random.default_rng(0)
    _check_agreement(calls, generator.integers(0, VOCABULARY, (1, 16)))
    for round_number in range(-1, rounds):  # the first round warms up
        for tokens in TOKEN_COUNTS:
            for name, call in calls.items():
                ids = generator.integers(0, VOCABULARY, (1, tokens))
                seconds = cpu_seconds(lambda call=call, ids=ids: call(ids))
                if round_number >= 0:
                    measured.seconds.setdefault((name, tokens), []).append(seconds)
        measured.limits.measure()
    return measured


def _check_agreement(calls: dict[str, Call], ids: NDArray[np.int64]) -> None:
    reference: NDArray[np.float32] | None = None
    for name, call in calls.items():
        if name in (DENSE, NO_MLP):
            continue
        logits = np.asarray(call(ids))
        reference = logits if reference is None else reference
        difference = float(np.abs(logits - reference).max() / np.abs(reference).max())
        if difference > 1e-4:
            raise SystemExit(f"{name} computes something else: relative difference {difference:.2e}")


def table(measured: Measured) -> str:
    """The medians, the bounds and what making each artifact took, as text."""
    subjects = list(dict.fromkeys(name for name, _ in measured.seconds))
    lines = [f"{'milliseconds per call':30}" + "".join(f"{f'{tokens} tokens':>12}" for tokens in TOKEN_COUNTS)]
    for name in subjects:
        cells = "".join(f"{measured.median(name, tokens) * 1e3:12.2f}" for tokens in TOKEN_COUNTS)
        lines.append(f"{name:30}{cells}")
    lines.append("")
    lines.append(f"memory bandwidth {measured.limits.bytes_per_second / 1e9:.1f} GB/s, ")
    lines[-1] += f"matrix products {measured.limits.flops_per_second / 1e9:.1f} GFLOP/s"
    lines.append(f"reading the {active_bytes() / 2**20:.0f} MiB of one token: {measured.decode_bound * 1e3:.2f} ms")
    for name in (PORTABLE, ORT_CPU):
        if name in subjects:
            lines += _ratios(measured, name, subjects)
    making = ", ".join(f"{name} {seconds:.1f}" for name, seconds in measured.making.items())
    lines.append(f"CPU seconds to make: {making}")
    return "\n".join(lines)


def _ratios(measured: Measured, name: str, subjects: list[str]) -> list[str]:
    lines = [f"{name}: decode takes {measured.median(name, 1) / measured.decode_bound:.2f} of the bandwidth bound"]
    if DENSE in subjects and NO_MLP in subjects:
        whole = measured.median(name, 512) / measured.median(DENSE, 512)
        experts = measured.experts_only(name, 512) / measured.experts_only(DENSE, 512)
        lines.append(f"{name}: 512 tokens take {whole:.2f} of the dense model; experts alone {experts:.2f}")
    for peer in (EXPORT, FUSED_EXPORT, ALL_EXPERTS, TORCH):
        if peer in subjects:
            ratios = (measured.median(name, tokens) / measured.median(peer, tokens) for tokens in TOKEN_COUNTS)
            lines.append(f"{name} / {peer}: " + ", ".join(f"{ratio:.2f}" for ratio in ratios))
    return lines


SUBJECTS = (PORTABLE, ORT_CPU, DENSE, NO_MLP, EXPORT, FUSED_EXPORT, ALL_EXPERTS, TORCH)


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(description="Speed of compiled experts beside their peers, one thread.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="keep the 12 GB of artifacts here and use what is there already")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        print(table(measure(folder, arguments.rounds, tuple(arguments.subjects))))


if __name__ == "__main__":
    main()
