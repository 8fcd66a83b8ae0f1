"""Measures what pipelines cost small trained models: held-out loss against bytes of experts.

    base = compress("scratch", "")
    pruned = compress("scratch", "prune-experts{criterion=reap-sum ratio=0.5}", seed=1)
    pruned.increase, pruned.expert_share, paired_interval(pruned, base)

Models are raised once per process and calibrated once per (model, seed); each pipeline runs on a copy of the IR.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import moec
from moec.artifact.options import RAISING_PIPELINE
from moec.artifact.text import TextCodec, TokenizedText
from moec.artifact.tokens import TokenBatch, function_inputs
from moec.dialects.builtin import ModuleOp, WeightOp
from moec.dialects.moe import ExpertsOp
from moec.dialects.quant import DequantOp
from moec.frontend.huggingface import load_huggingface
from moec.ir import TensorType
from moec.module import Module
from moec.reference.executor import Executor
from moec.weights.store import WeightStore
from tests.quality.corpus import slice_path

REPOSITORY = Path(__file__).parents[2]
EXAMPLE_TEXTS = REPOSITORY / "examples" / "data"
CALIBRATION_TEXTS = Path(moec.__file__).parent / "calibration" / "texts"

SEQUENCES, LENGTH = 160, 64
"""How much held-out text one measurement reads: so many windows of so many tokens, spread evenly over the text."""

CALIBRATION_SEQUENCES = 128

SEEDS = (0, 1, 2)
"""Seeds of the calibration, each of which picks other windows, that orderings are tested over."""

UNIT_BYTES = 2
"""Bytes of one expert parameter in the account. The fixtures are bfloat16; tensors that passes compute may be kept
wider in the store, but an artifact has one element type for all."""


@dataclass(frozen=True)
class Fixture:
    """A trained model with text of its own kind to calibrate and to measure on, and text of another kind."""

    folder: Path
    calibration: Path
    heldout: Path
    other: Path


FIXTURES: dict[str, Fixture] = {
    name: Fixture(
        Path(__file__).parent / "models" / name,
        slice_path("calibration"),
        slice_path("heldout"),
        EXAMPLE_TEXTS / "shakespeare.heldout.txt",
    )
    for name in ("scratch", "upcycled")
}
FIXTURES["tiny-moe"] = Fixture(
    REPOSITORY / "examples" / "models" / "tiny-moe",
    CALIBRATION_TEXTS / "kjv.calibration.txt",
    EXAMPLE_TEXTS / "kjv.heldout.txt",
    EXAMPLE_TEXTS / "shakespeare.heldout.txt",
)


@dataclass(frozen=True)
class Measured:
    """One compressed model. `losses` float64 [sequences] in nats per byte; `increase` is their mean less the source's.

    `expert_bytes` are the bytes of the weights of all experts, `expert_share` their share of the source's.
    """

    losses: NDArray[np.float64]
    increase: float
    expert_bytes: int
    expert_share: float


def load(name: str) -> Module:
    """A fixture's raised module, the caller's own."""
    return _copy(_raised(name))


def calibrated(name: str, seed: int = 0, *, gradients: bool = False) -> Module:
    """A fixture after `calibrate` on the windows of its calibration text that `seed` picks; the caller's own."""
    return _copy(_calibrated(name, seed, gradients))


def compress(name: str, pipeline: str, seed: int = 0, *, gradients: bool = False) -> Measured:
    """Runs a pipeline on the calibrated fixture and measures it on the held-out text."""
    module = calibrated(name, seed, gradients=gradients)
    moec.run_passes(module, pipeline, seed=seed)
    return measure(name, module)


def increases(
    name: str, pipeline: str, *, seeds: tuple[int, ...] = SEEDS, gradients: bool = False
) -> NDArray[np.float64]:
    """Increase of the loss after a pipeline for each seed of the calibration, float64 [seeds]; measured once."""
    return np.asarray([_increase(name, pipeline, seed, gradients) for seed in seeds], np.float64)


def shown(label: str, found: NDArray[np.float64]) -> NDArray[np.float64]:
    """Prints what was found for each seed, and gives it back."""
    print(f"{label}: {found.mean():+.4f}, by seed {' '.join(f'{value:+.4f}' for value in found)}")
    return found


def measure(name: str, module: Module) -> Measured:
    """Loss and bytes of a module made from the fixture `name`."""
    losses = loss(module, FIXTURES[name].heldout)
    size = expert_bytes(module)
    return Measured(losses, float(losses.mean() - source_losses(name).mean()), size, size / expert_bytes(_raised(name)))


def other_increase(name: str, module: Module) -> float:
    """Increase of the loss in nats per byte on text of another kind than the calibration text."""
    other = FIXTURES[name].other
    return float(loss(module, other).mean() - _source_losses(name, other).mean())


def source_losses(name: str) -> NDArray[np.float64]:
    """Losses of the fixture itself on its held-out text, as `loss`."""
    return _source_losses(name, FIXTURES[name].heldout)


def loss(module: Module, text: Path, *, sequences: int = SEQUENCES, length: int = LENGTH) -> NDArray[np.float64]:
    """Loss of each window of a text, float64 [sequences], scaled so that their mean is nats per byte of the text."""
    return predict(module, text, sequences=sequences, length=length).losses()


@dataclass(frozen=True)
class Predictions:
    """What a model says of windows of text: `logits` float32 [sequences, length, vocabulary] of the `targets` i64
    [sequences, length], which are `bytes` of the text."""

    logits: torch.Tensor
    targets: torch.Tensor
    bytes: int

    def losses(self) -> NDArray[np.float64]:
        """Of each window, float64 [sequences], scaled so that their mean is nats per byte."""
        parts = [
            torch.nn.functional.cross_entropy(rows.double().mT, wanted, reduction="none").sum(1)
            for rows, wanted in zip(self.logits.split(16), self.targets.split(16), strict=True)
        ]
        return np.asarray(torch.cat(parts).numpy() * (len(self.targets) / self.bytes), np.float64)

    def divergence(self, other: Predictions) -> float:
        """Of another model's predictions from these, Kullback-Leibler, nats per byte.

        A change of the loss also has a part that is as likely a gain: where a model is hardly changed that is the
        larger one. This has not: it is what the change costs on text of this model's own.
        """
        total = 0.0
        for mine, theirs in zip(self.logits.split(16), other.logits.split(16), strict=True):
            wanted, found = (torch.log_softmax(rows.double(), -1) for rows in (mine, theirs))
            total += float((wanted.exp() * (wanted - found)).sum())
        return total / self.bytes


def predict(module: Module, text: Path, *, sequences: int = SEQUENCES, length: int = LENGTH) -> Predictions:
    """Predictions for windows spread evenly over a text."""
    folder = module.source.folder
    assert folder is not None
    tokenized = _tokens(folder, text)
    starts = _spread(len(tokenized.ids), sequences, length)
    tokens = tokenized.ids[starts[:, None] + np.arange(length + 1)]
    covered = sum(tokenized.bytes_of(start + 1, start + length + 1) for start in starts.tolist())
    batch = TokenBatch(np.ascontiguousarray(tokens[:, :-1]), np.ones((sequences, length), np.int64))
    with torch.no_grad():
        results = Executor(module.op, module.weights, keep_weights=True).run(function_inputs(module.main, batch))
    return Predictions(next(iter(results.values())), torch.from_numpy(tokens[:, 1:]), covered)


def expert_bytes(module: Module) -> int:
    """Bytes of all weights that experts read, each weight expression once, at `UNIT_BYTES` per parameter; parts of
    packed matrices in the types that they are stored in."""
    sizes: dict[str, int] = {}
    for op in module.op.walk():
        if isinstance(op, ExpertsOp):
            for _, weights, region in op.class_operands():
                for value, argument in zip(weights, region.block.arguments[1:], strict=True):
                    weight, kind = value.defining_op, value.type
                    assert isinstance(weight, WeightOp) and isinstance(kind, TensorType)
                    packed = any(isinstance(user, DequantOp) for user in argument.users)
                    itemsize = kind.dtype.bytes if packed else UNIT_BYTES
                    sizes[weight.source] = itemsize * int(np.prod(kind.static_shape))
    return sum(sizes.values())


def paired_interval(
    first: Measured, second: Measured, *, level: float = 0.95, resamples: int = 10_000
) -> tuple[float, float]:
    """Bootstrap interval of the mean of `first.losses - second.losses`, paired by sequence, with a fixed seed."""
    differences = first.losses - second.losses
    generator = np.random.default_rng(0)
    picked = generator.integers(len(differences), size=(resamples, len(differences)))
    low, high = np.quantile(differences[picked].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _spread(available: int, sequences: int, length: int) -> NDArray[np.int64]:
    """First tokens of `sequences` windows of `length` inputs and one target, evenly over `available` tokens."""
    return np.linspace(0, available - length - 1, sequences).astype(np.int64)


@functools.cache
def _scratch_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="moec-quality-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _tokens(folder: Path, text: Path) -> TokenizedText:
    return TextCodec(folder).read(text)


@functools.cache
def _raised(name: str) -> Module:
    module = load_huggingface(FIXTURES[name].folder, WeightStore(_scratch_folder() / "store"))
    moec.run_passes(module, RAISING_PIPELINE)
    return module


@functools.cache
def _calibrated(name: str, seed: int, gradients: bool) -> Module:
    module = load(name)
    text = FIXTURES[name].calibration
    flags = f"text={text} sequences={CALIBRATION_SEQUENCES} length={LENGTH} gradients={str(gradients).lower()}"
    moec.run_passes(module, f"calibrate{{{flags}}}", seed=seed)
    return module


@functools.cache
def _increase(name: str, pipeline: str, seed: int, gradients: bool) -> float:
    return compress(name, pipeline, seed, gradients=gradients).increase


@functools.cache
def _source_losses(name: str, text: Path) -> NDArray[np.float64]:
    return loss(_raised(name), text)


def _copy(module: Module) -> Module:
    clone = module.op.clone()
    assert isinstance(clone, ModuleOp)
    return dataclasses.replace(module, op=clone)
