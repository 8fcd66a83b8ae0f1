"""Branch-Train-MiX of the small dense model: losses of the seed, its fine-tunes and what joins them, by kind of text.

    python -m tests.quality.branch_train_mix folder    # makes fine-tunes there, unless it has them; prints the table

About five minutes of one CPU core, most of them for the fine-tunes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import moec
from moec.artifact.evaluation import source_scorer
from moec.artifact.loss import LossSettings, measure_loss
from moec.artifact.options import RAISING_PIPELINE
from moec.artifact.text import TextCodec
from moec.frontend.huggingface import load_huggingface
from moec.module import Module
from moec.weights.store import WeightStore
from tests.quality.fine_tunes import KINDS, SEED_MODEL, fine_tune

SETTINGS = LossSettings(window=256, limit=6000)
_TEXTS = ",".join(str(kind.training[0]) for kind in KINDS)
_JOIN = "upcycle{sources=all rest=average k=2}"
PIPELINES = {
    "their average": "merge-models{method=average}",
    "btx, random router": _JOIN,
    "btx, router by text": (
        f"{_JOIN},calibrate{{text={_TEXTS} sequences=120 length=64}},init-router{{kind=domain-embedding}}"
    ),
    "btx, routers tuned": (f"{_JOIN},tune{{train=router target=text text={_TEXTS} steps=60 sequences=960 rate=0.01}}"),
}
"""What becomes of the three fine-tunes together."""


@dataclass(frozen=True)
class Losses:
    """Nats per token of one model on the held-out text of each kind, in their order."""

    subject: str
    nats: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the kinds."""
        return sum(self.nats) / len(self.nats)


def fine_tunes(folder: Path) -> list[Path]:
    """A fine-tune for each kind, in `folder`; those that are there stay."""
    found = [folder / kind.name for kind in KINDS]
    for kind, path in zip(KINDS, found, strict=True):
        if not (path / "model.safetensors").is_file():
            fine_tune(kind, path)
    return found


def measure(subject: str, module: Module) -> Losses:
    """Losses on all kinds of text."""
    codec, score = TextCodec(SEED_MODEL), source_scorer(module)
    texts = [codec.read(kind.heldout) for kind in KINDS]
    return Losses(subject, tuple(measure_loss(text, subject, score, SETTINGS).nats_per_token for text in texts))


_EXPERT_MERGING = f"merge-models{{method=fit texts={_TEXTS}}}"


def rows(folder: Path) -> Iterator[Losses]:
    """The seed, its fine-tunes, each of `PIPELINES`, and the seed plus fitted shares of what the fine-tunes learned."""
    yield measure("seed", load_huggingface(SEED_MODEL))
    models = fine_tunes(folder)
    for kind, path in zip(KINDS, models, strict=True):
        yield measure(f"fine-tune on {kind.name}", load_huggingface(path))
    for name, pipeline in PIPELINES.items():
        module = load_huggingface(models[0], WeightStore(folder / "store"), models[1:])
        moec.run_passes(module, f"{RAISING_PIPELINE},{pipeline}")
        yield measure(name, module)
    module = load_huggingface(SEED_MODEL, WeightStore(folder / "store"), models)
    moec.run_passes(module, f"{RAISING_PIPELINE},{_EXPERT_MERGING}")
    yield measure("expert merging", module)


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    print("".ljust(28), *[kind.name.rjust(12) for kind in KINDS], "mean".rjust(12))
    for row in rows(Path(sys.argv[1])):
        print(row.subject.ljust(28), *[f"{value:12.4f}" for value in (*row.nats, row.mean)], flush=True)


if __name__ == "__main__":
    main()
