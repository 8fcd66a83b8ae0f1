"""Fine-tunes of the small dense model, one for each kind of text: the sources of Branch-Train-MiX.

    python -m tests.quality.fine_tunes -o folder

They are made where they are needed, not kept: each takes about a minute of one CPU core.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
SEED_MODEL = ROOT / "examples/models/tiny-dense"
_EXAMPLES = ROOT / "examples/data"
_DATA = ROOT / "tests/quality/data"


@dataclass(frozen=True)
class Kind:
    """A kind of text: what a fine-tune sees, how long and with which learning rate, and what it is measured on.

    The seed model knows Shakespeare well: with the rate of the others it forgets what other plays have in common.
    """

    name: str
    training: tuple[Path, ...]
    heldout: Path
    epochs: int = 2
    learning_rate: float = 5e-4


KINDS = (
    Kind("kjv", (_DATA / "kjv.training.txt",), _EXAMPLES / "kjv.heldout.txt"),
    Kind("shakespeare", (_DATA / "shakespeare.training.txt",), _EXAMPLES / "shakespeare.heldout.txt", 1, 2e-4),
    Kind("python", (_DATA / "python.calibration.txt", _DATA / "python.selection.txt"), _DATA / "python.heldout.txt"),
)


@dataclass(frozen=True)
class Settings:
    """Lengths in tokens; the learning rate rises over the first tenth of the steps and then falls to zero."""

    window: int = 256
    batch: int = 4
    seed: int = 0


def fine_tune(kind: Kind, output: Path, settings: Settings | None = None, source: Path = SEED_MODEL) -> int:
    """Writes a fine-tune of `source` on one kind of text as the Hugging Face folder `output`; gives its steps."""
    settings = settings or Settings()
    torch.manual_seed(settings.seed)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    ids = [tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False).ids for path in kind.training]
    stream = torch.tensor([token for part in ids for token in part])
    generator = torch.Generator().manual_seed(settings.seed)
    steps = kind.epochs * len(stream) // (settings.batch * settings.window)
    optimizer = torch.optim.AdamW(model.parameters(), lr=kind.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = kind.learning_rate * min(1.0, (step + 1) / (steps / 10)) * (1 - step / steps)
        starts = torch.randint(len(stream) - settings.window, (settings.batch,), generator=generator)
        windows = torch.stack([stream[start : start + settings.window] for start in starts.tolist()])
        loss = model(input_ids=windows, labels=windows).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(output)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(source / name, output / name)
    return steps


def main() -> None:
    """Makes all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for one folder of each kind")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for kind in KINDS:
        started = time.process_time()
        steps = fine_tune(kind, arguments.output / kind.name)
        print(f"{kind.name}: {steps} steps, {time.process_time() - started:.0f} CPU seconds", flush=True)


if __name__ == "__main__":
    main()
