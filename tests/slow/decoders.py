"""Which decoders with experts compile to ONNX: `python -m tests.slow.decoders docs/architectures_onnx.md`.

Each is built small from its default config with random weights, saved by transformers, compiled to portable ONNX and
compared with transformers in onnxruntime: whole left-padded sequences, and token by token where it has a cache.
"""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import tempfile
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch

from moec.artifact.compilation import compile_folder
from moec.artifact.options import Check, CompileOptions
from moec.errors import MoecError, UnsupportedModelError
from tests.frontend.architectures import MODEL_TYPES, small_model
from tests.parity.comparison import BOUND, relative_difference
from tests.parity.compiled_model import padded_batch
from tests.parity.onnx_session import OnnxSession
from tests.parity.source_model import SourceModel

HEADER = """# Decoders with experts, as portable ONNX

Every decoder with Mixture-of-Experts layers that transformers 5.23 has, built small from its default config with random
weights, compiled with `moec compile` for the target `portable` and compared with transformers in float32: largest
difference of the logits of left-padded batches, relative to the largest logit (allowed: 1e-4). Written by
`python -m tests.slow.decoders docs/architectures_onnx.md`; `make test-slow` compares with it.
[architectures.md](architectures.md) says what else loads.

- *routing*: `moe.route` where the router became one operation; otherwise its arithmetic stays as it is.
- *cache*: whether the model takes keys and values of earlier tokens. One without gets whole sequences.

"""


class Status(Enum):
    """How it ended. A model that is WRONG or FAILED is a defect of moec; REFUSED has a reason."""

    OK = "ok"
    REFUSED = "refused"
    WRONG = "wrong"
    FAILED = "failed"


@dataclass(frozen=True)
class Outcome:
    """What became of one architecture. `difference` is relative to the largest logit."""

    model_type: str
    status: Status
    class_name: str = ""
    detail: str = ""
    difference: float = 0.0
    layers: int = 0
    routes: int = 0
    cached: bool = False

    def row(self) -> str:
        """The row of the table."""
        if self.status is not Status.OK:
            return f"| {self.model_type} | {self.class_name} | {self.status.value}: {self.detail} | | | | |"
        routing = "moe.route" if self.routes == self.layers else "aten" if not self.routes else "both"
        cache = "yes" if self.cached else "no"
        cells = (self.model_type, self.class_name, "ok", self.layers, routing, cache, f"{self.difference:.0e}")
        return "| " + " | ".join(str(cell) for cell in cells) + " |"


def examine(model_type: str) -> Outcome:
    """Builds, compiles and compares one architecture."""
    root = Path(tempfile.mkdtemp())
    try:
        return _examine(model_type, root)
    except Exception as error:
        return Outcome(model_type, Status.FAILED, detail=f"{type(error).__name__}: {_one_line(str(error))}")
    finally:
        shutil.rmtree(root)


def _examine(model_type: str, root: Path) -> Outcome:
    model = small_model(model_type)
    name = type(model).__name__
    model.save_pretrained(root / "checkpoint")
    ids, mask = padded_batch(left=True)
    expected = SourceModel(model, is_encoder=False).logits(ids, mask)
    try:
        options = CompileOptions(check=Check.NONE, verify=False)
        result = compile_folder(root / "checkpoint", root / "artifact", options)
    except UnsupportedModelError as error:
        return Outcome(model_type, Status.REFUSED, name, _one_line(error.message))
    except MoecError as error:
        return Outcome(model_type, Status.FAILED, name, _one_line(str(error)))
    session = OnnxSession.load(result.folder / "onnx" / "model.onnx")
    kept = mask.astype(bool)
    difference = relative_difference(session.prefill(ids, mask)[kept], expected[kept])
    if session.cache_shapes:
        first = int((mask == 0).sum(axis=1).max()) + 1
        stepwise = session.decode(ids, mask, first=first)
        difference = max(difference, relative_difference(stepwise[kept], expected[kept]))
    counts = result.module.operation_counts()
    return Outcome(
        model_type,
        Status.OK if difference <= BOUND else Status.WRONG,
        name,
        "" if difference <= BOUND else f"largest difference {difference:.1e}",
        difference,
        counts.get("moe.experts", 0),
        counts.get("moe.route", 0),
        bool(session.cache_shapes),
    )


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:300]


def table(outcomes: list[Outcome]) -> str:
    """The page, in Markdown."""
    good = sum(outcome.status is Status.OK for outcome in outcomes)
    rows = ["| model_type | class | compiles | layers with experts | routing | cache | difference |"]
    rows += ["|---|---|---|---|---|---|---|", *(outcome.row() for outcome in outcomes)]
    return f"{HEADER}{good} of {len(outcomes)} compile.\n\n" + "\n".join(rows) + "\n"


def main(arguments: list[str]) -> None:
    """Examines the model types that are named, else all of them; writes the page if a path is given."""
    torch.set_num_threads(1)
    paths = [Path(argument) for argument in arguments if argument.endswith(".md")]
    names = [argument for argument in arguments if not argument.endswith(".md")] or list(MODEL_TYPES)
    outcomes = []
    # A process for each: what tracing leaves behind would add up.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=4) as pool:
        for outcome in pool.imap(examine, names):
            print(outcome.row(), flush=True)
            outcomes.append(outcome)
    for path in paths:
        path.write_text(table(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
