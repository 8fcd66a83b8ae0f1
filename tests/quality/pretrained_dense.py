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
import functools
import statistics
import subprocess
import sys
import tempfile
from enum import Enum
from pathlib import Path

import numpy as np
import torch

import moec
from moec.artifact.summary import model_size
from moec.frontend.model_kind import ModelKind
from moec.module import Module
from moec.pipeline.recipes import RecipeRequest, find_recipe
from tests.benchmarks.layer_speed import Call, load_onnx
from tests.benchmarks.machine import cpu_seconds
from tests.quality.dense_to_moe import (
    ACTIVE,
    EXPERTS,
    LENGTH,
    Source,
    choose_by_activity,
    copied,
    dense_loss,
    heldout_loss,
    raised,
)
from tests.slow.packages import smollm2_folder

DECODE, PREFILL = 1, 128
DENSE = 0
"""In place of a number of experts: the dense model."""


class Part(Enum):
    """What of the table is measured."""

    ALL = "all"
    LOSS = "loss"
    SPEED = "speed"


def recipe(source: Source, k: int) -> str:
    """What `moec compile --recipe` is given for k experts."""
    return f"best{{experts={EXPERTS} k={k} sequences={source.calibration} length={LENGTH}}}"


class Losses:
    """The recipe `best`, run up to its last pass, which alone knows k, with the recipe's partition or a random one.

    The calibration is that of the dense model, which the factorised one computes, so that partitions share it.
    """

    def __init__(self, source: Source, partition: str = "k-means") -> None:
        request = RecipeRequest.parse(recipe(source, EXPERTS))
        text = find_recipe(request.name, ModelKind.DENSE).text(settings=request.settings)
        factorize, calibrate, *routers, self._routing = (part.strip() for part in text.split(","))
        assert calibrate.startswith("calibrate{")
        self._source, self._prepared = source, copied(_calibrated(source, calibrate))
        divided = factorize.replace("{", f"{{partition={partition} ", 1)
        moec.run_passes(self._prepared, ",".join([divided, *routers]))

    def at(self, k: int) -> Module:
        """The model that the recipe makes with k experts."""
        module = copied(self._prepared)
        moec.run_passes(module, self._routing.replace(f"k={EXPERTS}", f"k={k}", 1))
        return module

    def loss(self, k: int) -> float:
        """Its held-out loss in nats per byte, the mean over the texts."""
        return heldout_loss(self.at(k), self._source)

    def oracle_loss(self, k: int) -> float:
        """The same where a token gets the experts that give it most, with gates one and the scale that fits best."""
        module = copied(self._prepared)
        choose_by_activity(module, k, calibrated_scale=True)
        return heldout_loss(module, self._source)


@functools.cache
def _calibrated(source: Source, calibrate: str) -> Module:
    module = copied(raised(source))
    moec.run_passes(module, calibrate)
    return module


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
    dense = model_size(raised(source)).active_flops / 1e6
    print(f"{source.folder.name}: dense {dense_loss(source):.4f} nats per byte, {dense:.1f} MFLOP for a token")
    columns = ("active MFLOP", "best", "random partition", "oracle router")
    print(f"{'k':>2}" + "".join(f"{name:>18}" for name in columns), flush=True)
    best, drawn = Losses(source), Losses(source, "random")
    for k in ACTIVE:
        found = [best.loss(k)] if k == EXPERTS else [best.loss(k), drawn.loss(k), best.oracle_loss(k)]
        flops = model_size(best.at(k)).active_flops / 1e6
        print(f"{k:2}{flops:18.1f}" + "".join(f"{number:18.4f}" for number in found), flush=True)


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
