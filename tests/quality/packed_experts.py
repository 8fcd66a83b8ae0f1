"""Packed experts on trained models: `best4`, `best3` and `best2` against nearest codes and GPTQ at equal stored bytes.

    python -m tests.quality.packed_experts [--model scratch] [--bits 3]

Bytes are those of codes, scales and zero points as they are stored. Errors are relative squared errors of layers on
held-out text, each layer on what it reads in the source; losses are in nats per byte on more held-out windows than
elsewhere, since 3 bits cost little. GPTQ is measured with its own damping of .01, and with ten times as much.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import moec
from moec.calibration.calibration import Calibration
from moec.experts import MoeLayer, find_moe_layers, load_expert, run_layer
from moec.frontend.model_kind import ModelKind
from moec.module import Module
from moec.pipeline.recipes import find_recipe
from tests.quality import harness
from tests.quality.harness import FIXTURES, SEEDS, calibrated, expert_bytes, load, loss

MODELS = ("scratch", "upcycled", "tiny-moe")
BITS = (4, 3, 2)
WINDOWS = 640
_PROBE = "sequences=64 length=64 reservoir=4096"
_PROBE_SEED = 99
_LEAST_ROWS = 16


@dataclass(frozen=True)
class Outcome:
    """One way to pack a model's experts: stored `bytes`, increases of the loss and errors of layers float64 [seeds]."""

    title: str
    bytes: int
    increases: NDArray[np.float64]
    errors: NDArray[np.float64]

    @property
    def increase(self) -> float:
        """The mean over seeds."""
        return float(self.increases.mean())

    @property
    def error(self) -> float:
        """The mean over seeds."""
        return float(self.errors.mean())


def rivals(bits: int) -> dict[str, str]:
    """Pipelines behind `calibrate`, by their names."""
    return {
        "nearest codes": f"quantize{{bits={bits} group=32}}",
        "GPTQ": f"quantize{{bits={bits} group=32 method=gptq calibration=routed damping=0.01}}",
        "GPTQ, damping .1, auto": f"quantize{{bits={bits} group=32 method=gptq}}",
    }


def best(bits: int) -> str:
    """The pipeline of `best<bits>` behind its calibration, which the harness has made."""
    text = find_recipe(f"best{bits}", ModelKind.MOE).text()
    first, _, rest = text.partition(",")
    assert first == "calibrate"
    return rest


@functools.cache
def outcome(name: str, title: str, pipeline: str, seeds: tuple[int, ...] = SEEDS) -> Outcome:
    """Measures a pipeline with each seed of the calibration."""
    size, increases, errors = 0, [], []
    for seed in seeds:
        module = calibrated(name, seed)
        moec.run_passes(module, pipeline, seed=seed)
        size = expert_bytes(module)
        increases.append(float(_loss(name, module).mean() - _source_loss(name)))
        errors.append(layer_error(name, module))
    return Outcome(title, size, np.asarray(increases), np.asarray(errors))


def outcomes(name: str, bits: int) -> tuple[Outcome, list[Outcome]]:
    """(the recipe, its rivals) at one number of bits."""
    # nearest codes do not depend on the calibration
    found = [outcome(name, title, text, SEEDS if "gptq" in text else SEEDS[:1]) for title, text in rivals(bits).items()]
    return outcome(name, f"best{bits}", best(bits)), found


def layer_error(name: str, module: Module) -> float:
    """Relative squared error of the layers of a module made from a fixture, the mean of them, on held-out rows."""
    calibration, layers = _probe(name)
    errors = []
    for old, new in zip(layers, find_moe_layers(module.op), strict=True):
        sample = calibration.sample(old)
        found = run_layer(new, module.weights, sample.x, sample.router_input).y
        assert found is not None
        wanted = sample.y.double()
        errors.append(float((found.double() - wanted).square().sum() / wanted.square().sum()))
    return float(np.mean(errors))


@dataclass(frozen=True)
class ExpertErrors:
    """Relative squared errors of what experts give on the held-out rows that chose them, at least 16 for each.

    The largest and the mean one of all experts, and that of all experts together, each row by the square of its gate.
    """

    largest: float
    mean: float
    by_gates: float


def expert_errors(name: str, module: Module) -> ExpertErrors:
    """Those of a module made from a fixture."""
    calibration, layers = _probe(name)
    errors, wrong, total = [], 0.0, 0.0
    for old, new in zip(layers, find_moe_layers(module.op), strict=True):
        sample = calibration.sample(old)
        for number in range(old.expert_count):
            rows, gates = sample.chosen(old, number)
            if len(rows) < _LEAST_ROWS:
                continue
            x = sample.x[rows].float()
            wanted = load_expert(old, module.weights, number).apply(x).double()
            moved = (load_expert(new, module.weights, number).apply(x) - wanted).square().sum(1)
            errors.append(float(moved.sum() / wanted.square().sum()))
            wrong += float((gates.square() * moved).sum())
            total += float((gates.square() * wanted.square().sum(1)).sum())
    return ExpertErrors(max(errors), float(np.mean(errors)), wrong / total)


@functools.cache
def _probe(name: str) -> tuple[Calibration, list[MoeLayer]]:
    """The source's layers, and what they read and give on held-out text."""
    module = load(name)
    moec.run_passes(module, f"calibrate{{text={FIXTURES[name].heldout} {_PROBE}}}", seed=_PROBE_SEED)
    assert module.calibration is not None
    return module.calibration, find_moe_layers(module.op)


def _loss(name: str, module: Module) -> NDArray[np.float64]:
    return loss(module, FIXTURES[name].heldout, sequences=WINDOWS)


@functools.cache
def _source_loss(name: str) -> float:
    return float(_loss(name, load(name)).mean())


def main() -> None:
    """Reads the command line and prints the tables."""
    parser = argparse.ArgumentParser(description="Recipes of packed experts against nearest codes and GPTQ.")
    parser.add_argument("--model", choices=MODELS, action="append", help="only this fixture; may be repeated")
    parser.add_argument("--bits", type=int, choices=BITS, action="append", help="only so many bits; may be repeated")
    arguments = parser.parse_args()
    print(
        f"means of {len(SEEDS)} seeds of the calibration, ranges in brackets; {harness.LENGTH * WINDOWS} tokens of text"
    )
    print(f"{'model':10}{'bits':>4}  {'':24}{'bytes':>11}{'error of layers':>18}{'increase of the loss':>30}")
    for name in arguments.model or MODELS:
        for bits in arguments.bits or BITS:
            recipe, others = outcomes(name, bits)
            for item in (*others, recipe):
                spread = f"[{item.increases.min():+.4f} {item.increases.max():+.4f}]"
                numbers = f"{item.bytes:11,}{item.error:18.5f}{item.increase:+12.5f}  {spread}"
                print(f"{name:10}{bits:4}  {item.title:24}{numbers}", flush=True)


if __name__ == "__main__":
    main()
