"""SmolLM2-135M as experts: loss, active FLOPs and speed beside the dense model, in one table.

    python -m tests.quality.pretrained_dense                  # fetches the model as examples/fetch_smollm2.py does
    python -m tests.quality.pretrained_dense --model FOLDER   # any gated dense decoder
    python -m tests.quality.pretrained_dense --part speed --artifacts FOLDER   # one half of it, artifacts kept

For each number of experts: the loss with k-means, a least-squares router and a calibrated scale (recipe `best`), with a
random partition, and with a router that knows what each expert would give; and how many times faster than the dense
artifact the ONNX artifact decodes and prefills, in one run that takes turns, on one thread. With all experts chosen no
router decides anything, so there is one loss.

Calibration text and held-out text are different passages; nothing is chosen by a result, so no third text is needed.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from enum import Enum
from pathlib import Path

import numpy as np
import torch

from moec.artifact.summary import model_size
from moec.frontend.huggingface import load_huggingface
from tests.benchmarks.layer_speed import Call, load_onnx
from tests.benchmarks.machine import cpu_seconds
from tests.quality.dense_to_moe import ACTIVE, EXPERTS, LENGTH, ORACLE, Setting, Source, dense_loss, loss, routed_to
from tests.slow.packages import smollm2_folder

DECODE, PREFILL = 1, 128
DENSE = 0
"""In place of a number of experts: the dense model."""

BEST = Setting("k-means", calibrated_scale=True)
SETTINGS = {"best": BEST, "random partition": Setting("random", calibrated_scale=True)}
SETTINGS["oracle router"] = Setting("k-means", ORACLE, calibrated_scale=True)


class Part(Enum):
    """What of the table is measured."""

    ALL = "all"
    LOSS = "loss"
    SPEED = "speed"


def recipe(source: Source, k: int) -> str:
    """What `moec compile --recipe` is given for k experts."""
    return f"best{{experts={EXPERTS} k={k} sequences={source.calibration} length={LENGTH}}}"


def make_artifacts(source: Source, folder: Path) -> dict[int, Path]:
    """The ONNX file for each k and of the dense model, made by `moec compile` where `folder` has none."""
    found = {}
    for k in (DENSE, *ACTIVE):
        found[k] = folder / str(k) / "onnx" / "model.onnx"
        if not found[k].is_file():
            command = ["compile", str(source.folder), "-o", str(folder / str(k)), "--store", str(folder / "store")]
            command += ["--check", "none", "--no-verify", *(["--recipe", recipe(source, k)] if k else [])]
            subprocess.run([sys.executable, "-m", "moec", *command], check=True, stdout=subprocess.DEVNULL)
    return found


def speed_ups(artifacts: dict[int, Path], rounds: int) -> dict[int, tuple[float, float]]:
    """For each k how many times faster than the dense artifact (decode, prefill) the sparse one is: medians of CPU
    seconds over `rounds` rounds, in each of which every artifact runs once on tokens that no round before has seen."""
    calls: dict[int, Call] = {k: load_onnx(path) for k, path in artifacts.items()}
    generator = np.random.default_rng(0)
    seconds: dict[tuple[int, int], list[float]] = {}
    for round_number in range(-1, rounds):  # the first round warms up
        for tokens in (DECODE, PREFILL):
            ids = generator.integers(100, 4000, (1, tokens))
            for k, call in calls.items():
                found = cpu_seconds(lambda call=call, ids=ids: call(ids))
                if round_number >= 0:
                    seconds.setdefault((k, tokens), []).append(found)
    median = {key: statistics.median(found) for key, found in seconds.items()}
    return {k: (median[DENSE, DECODE] / median[k, DECODE], median[DENSE, PREFILL] / median[k, PREFILL]) for k in calls}


def print_speeds(source: Source, rounds: int, folder: Path) -> None:
    """One line for each number of experts: how many times faster than dense."""
    faster = speed_ups(make_artifacts(source, folder), rounds)
    print(f"times faster than dense ONNX, one thread, medians of {rounds} rounds")
    print(f"{'k':>2}{'decode':>9}{f'{PREFILL} tokens':>12}", flush=True)
    for k in ACTIVE:
        decode, prefill = faster[k]
        print(f"{k:2}{decode:9.2f}{prefill:12.2f}", flush=True)


def print_losses(source: Source) -> None:
    """One line for each number of experts: losses, and active FLOPs of a token."""
    dense = model_size(load_huggingface(source.folder)).active_flops / 1e6
    print(f"{source.folder.name}: dense {dense_loss(source):.4f} nats per byte, {dense:.1f} MFLOP for a token")
    print(f"{'k':>2}{'active MFLOP':>14}" + "".join(f"{name:>18}" for name in SETTINGS), flush=True)
    for k in ACTIVE:
        chosen = list(SETTINGS.values()) if k < EXPERTS else [BEST]
        cells = "".join(f"{loss(setting, k, source):18.4f}" for setting in chosen)
        flops = model_size(routed_to(BEST, k, source)).active_flops / 1e6
        print(f"{k:2}{flops:14.1f}{cells}", flush=True)


def main() -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description="A pretrained dense model as experts.")
    parser.add_argument("--model", type=Path, help="a folder with a gated dense decoder; without, SmolLM2-135M")
    parser.add_argument("--part", choices=[part.value for part in Part], default=Part.ALL.value)
    parser.add_argument("--artifacts", type=Path, help="where artifacts are kept for another run")
    parser.add_argument("--calibration", type=int, default=320, help=f"windows of {LENGTH} tokens")
    parser.add_argument("--heldout", type=int, default=48, help="windows of each held-out text")
    parser.add_argument("--rounds", type=int, default=9, help="of the speed measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.model or smollm2_folder()
    source = Source(folder, calibration=arguments.calibration, heldout=arguments.heldout, gradients=False)
    part = Part(arguments.part)
    if part is not Part.SPEED:
        print_losses(source)
    if part is not Part.LOSS:
        with tempfile.TemporaryDirectory() as scratch:
            print_speeds(source, arguments.rounds, arguments.artifacts or Path(scratch))


if __name__ == "__main__":
    main()
