"""SmolLM2-135M as experts: loss, active FLOPs and speed beside the dense model, in one table.

    python -m tests.quality.pretrained_dense                  # fetches the model as examples/fetch_smollm2.py does
    python -m tests.quality.pretrained_dense --model FOLDER   # any gated dense decoder

For each number of experts: the loss with k-means, a least-squares router and a calibrated scale (recipe `best`), with a
random partition, and with a router that knows what each expert would give; and how many times faster than the dense
artifact the ONNX artifact decodes and prefills, in one run that takes turns, on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from moec.artifact.summary import model_size
from tests.benchmarks.layer_speed import Call, load_onnx
from tests.benchmarks.machine import cpu_seconds
from tests.quality.dense_to_moe import ACTIVE, EXPERTS, LENGTH, ORACLE, Setting, Source, dense_loss, loss, routed_to
from tests.slow.packages import smollm2_folder

DECODE, PREFILL = 1, 128
BEST = Setting("k-means", calibrated_scale=True)
COLUMNS = ("best", "random partition", "oracle router")
SETTINGS = (BEST, Setting("random", calibrated_scale=True), Setting("k-means", ORACLE))


def speed_ups(source: Source, rounds: int) -> dict[int, tuple[float, float]]:
    """For each k how many times faster than the dense artifact (decode, prefill) the sparse one is: medians of CPU
    seconds over `rounds` rounds, in each of which every artifact runs once on tokens that no round before has seen."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        calls: dict[int, Call] = {}
        for k in (0, *ACTIVE):
            recipe = f"best{{experts={EXPERTS} k={k} sequences={source.calibration} length={LENGTH}}}"
            output = folder / str(k)
            command = ["compile", str(source.folder), "-o", str(output), "--store", str(folder / "store")]
            command += ["--check", "none", "--no-verify", *(["--recipe", recipe] if k else [])]
            subprocess.run([sys.executable, "-m", "moec", *command], check=True, stdout=subprocess.DEVNULL)
            calls[k] = load_onnx(output / "onnx" / "model.onnx")
        return _ratios(calls, rounds)


def _ratios(calls: dict[int, Call], rounds: int) -> dict[int, tuple[float, float]]:
    generator = np.random.default_rng(0)
    seconds: dict[tuple[int, int], list[float]] = {}
    for round_number in range(-1, rounds):  # the first round warms up
        for tokens in (DECODE, PREFILL):
            for k, call in calls.items():
                ids = generator.integers(100, 4000, (1, tokens))
                found = cpu_seconds(lambda call=call, ids=ids: call(ids))
                if round_number >= 0:
                    seconds.setdefault((k, tokens), []).append(found)
    median = {key: statistics.median(found) for key, found in seconds.items()}
    return {k: (median[0, DECODE] / median[k, DECODE], median[0, PREFILL] / median[k, PREFILL]) for k in calls if k}


def print_table(source: Source, rounds: int) -> None:
    """One line for each number of experts."""
    faster = speed_ups(source, rounds) if rounds else {}
    print(f"{source.folder.name}: dense {dense_loss(source):.4f} nats per byte, {EXPERTS} experts for each block")
    heads = "".join(f"{name:>18}" for name in COLUMNS)
    print(f"{'k':>2}{heads}{'active MFLOP':>14}{'decode':>9}{'prefill':>9}", flush=True)
    for k in ACTIVE:
        cells = "".join(f"{loss(setting, k, source):18.4f}" for setting in SETTINGS)
        flops = model_size(routed_to(BEST, k, source)).active_flops / 1e6
        speed = "".join(f"{ratio:9.2f}" for ratio in faster.get(k, ()))
        print(f"{k:2}{cells}{flops:14.1f}{speed}", flush=True)


def main() -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description="A pretrained dense model as experts.")
    parser.add_argument("--model", type=Path, help="a folder with a gated dense decoder; without, SmolLM2-135M")
    parser.add_argument("--calibration", type=int, default=320, help=f"windows of {LENGTH} tokens")
    parser.add_argument("--heldout", type=int, default=48, help="windows of each held-out text")
    parser.add_argument("--rounds", type=int, default=9, help="of the speed measurement; 0 for none")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.model or smollm2_folder()
    source = Source(folder, calibration=arguments.calibration, heldout=arguments.heldout, gradients=False)
    print_table(source, arguments.rounds)


if __name__ == "__main__":
    main()
