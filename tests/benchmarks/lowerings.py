"""The forms of `moe.experts` side by side, and the cost model's choice: `python -m tests.benchmarks.lowerings`.

Twelve cells of experts, hidden size, width, experts per token and tokens. Each cell is one MoE layer with random
weights on one thread; the forms take turns on fresh tokens, and the table shows medians; the bar of 1.15 is on
`choice/best`. The lean form in a function is not measured apart: ONNX Runtime inlines it, so the same graph runs.
Two more tables: decode with 128 experts beside 8 of equal width, and the time to load a file by experts.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnxruntime
import torch

from moec.codegen.onnx.cost_model import ExpertsShape, Lowering, choose, predict
from moec.codegen.onnx.emit import MODEL_FILE, emit_onnx
from moec.codegen.onnx.targets import Target
from tests.benchmarks.expert_layers import LayerShape, moe_layers
from tests.benchmarks.machine import cpu_seconds

CELLS = (
    (LayerShape(8, 64, 96, 2), (1, 512)),
    (LayerShape(8, 1024, 2048, 2), (1, 16, 512)),
    (LayerShape(32, 1024, 512, 4), (1, 128)),
    (LayerShape(64, 512, 256, 8), (1, 64)),
    (LayerShape(128, 512, 384, 4), (1, 16)),
    (LayerShape(256, 256, 128, 8), (1,)),
)
FORMS = (Lowering.LEAN, Lowering.FUSED)
BAR = 1.15
SPARSE_BAR = 1.5
OTHER_LAYERS_BYTES = 128 << 20


@dataclass(frozen=True)
class Cell:
    """Median seconds of each form for one layer and a number of tokens, and the form that the cost model takes."""

    shape: LayerShape
    tokens: int
    seconds: dict[Lowering, float]
    choice: Lowering

    @property
    def ratio(self) -> float:
        """Time of the chosen form over that of the fastest."""
        form = Lowering.FUSED if self.choice is Lowering.FUSED else Lowering.LEAN
        return self.seconds[form] / min(self.seconds.values())


def main() -> int:
    """Prints the tables; 1 where a bar is missed."""
    torch.set_num_threads(1)
    cells = [cell for shape, tokens in CELLS for cell in measure(shape, tokens)]
    print(f"{'experts':>7} {'hidden':>6} {'width':>5} {'top-k':>5} {'tokens':>6}", end="")
    print("".join(f" {form.value + ' ms':>16} {'(predicted)':>11}" for form in FORMS), f"{'choice':>14} choice/best")
    for cell in cells:
        print(_row(cell))
    worst = max(cell.ratio for cell in cells)
    print(f"worst choice/best over {len(cells)} cells: {worst:.2f} (bar {BAR})")
    sparse = sparsity()
    for target, ratio in sparse.items():
        text = f"{target.value}: decode with 128 experts over 8, top-4, equal width"
        print(f"{text}: {ratio:.2f} (bar {SPARSE_BAR})")
    for experts, seconds in load_seconds().items():
        print(f"session load, {experts} experts, lean: {seconds:.2f} s")
    return int(worst > BAR or max(sparse.values()) > SPARSE_BAR)


def measure(shape: LayerShape, token_counts: Sequence[int]) -> list[Cell]:
    """All forms of one layer at several numbers of tokens."""
    sessions = {form: session(shape, Target.ORT_CPU, form) for form in FORMS}
    generator = np.random.default_rng(0)
    facts = ExpertsShape(shape.experts, shape.top_k, 3 * shape.hidden * shape.width)
    cells = []
    for tokens in token_counts:
        times: dict[Lowering, list[float]] = {form: [] for form in FORMS}
        for _ in range(max(7, min(150, 600 // tokens))):
            x = generator.standard_normal((tokens, shape.hidden), dtype=np.float32)
            for form, found in sessions.items():
                times[form].append(cpu_seconds(lambda found=found, x=x: found.run(None, {"x": x})))
        medians = {form: statistics.median(values) for form, values in times.items()}
        cells.append(Cell(shape, tokens, medians, choose(facts, tokens, Target.ORT_CPU, None).lowering))
    return cells


def sparsity(shape: LayerShape = LayerShape(8, 1024, 704, 4)) -> dict[Target, float]:
    """Seconds to decode one token with 128 experts over those with 8 of equal width, as compiled for each target.

    Between two tokens as many bytes are read as any cache holds, as the other layers of a model would: half of the 8
    experts fit into a cache of 32 MiB, so one layer alone is never as slow as it is in a model.
    """
    ratios = {}
    others = torch.ones(OTHER_LAYERS_BYTES // 4096, 1024)
    for target in Target:
        sessions = {}
        for experts in (8, 128):
            wider = LayerShape(experts, shape.hidden, shape.width, shape.top_k)
            sessions[experts] = session(wider, target, None)
        generator = np.random.default_rng(0)
        times: dict[int, list[float]] = {experts: [] for experts in sessions}
        for _ in range(100):
            x = generator.standard_normal((1, shape.hidden), dtype=np.float32)
            for experts, found in sessions.items():
                others.sum()
                times[experts].append(cpu_seconds(lambda found=found, x=x: found.run(None, {"x": x})))
        ratios[target] = statistics.median(times[128]) / statistics.median(times[8])
    return ratios


def load_seconds(experts: Sequence[int] = (8, 64, 256)) -> dict[int, float]:
    """CPU seconds to load a file with one lean layer of small experts."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for count in experts:
            path = Path(folder) / str(count)
            emit_onnx(moe_layers(LayerShape(count, 256, 128, 4)), path, lowering=Lowering.LEAN)
            found[count] = cpu_seconds(lambda path=path: _load(path))
        return found


def session(shape: LayerShape, target: Target, form: Lowering | None) -> onnxruntime.InferenceSession:
    """One layer compiled for a target; the cost model decides where `form` is None."""
    with tempfile.TemporaryDirectory() as folder:
        emit_onnx(moe_layers(shape), Path(folder), target=target, lowering=form)
        found = _load(Path(folder))
    # the first use of a mapped weight costs page faults, which a running model has behind it
    for _ in range(3):
        found.run(None, {"x": np.random.default_rng(1).standard_normal((512, shape.hidden), dtype=np.float32)})
    return found


def _load(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(folder / MODEL_FILE), options, providers=["CPUExecutionProvider"])


def _row(cell: Cell) -> str:
    shape = cell.shape
    predicted = predict(ExpertsShape(shape.experts, shape.top_k, 3 * shape.hidden * shape.width), cell.tokens)
    text = f"{shape.experts:7} {shape.hidden:6} {shape.width:5} {shape.top_k:5} {cell.tokens:6}"
    for form in FORMS:
        text += f" {1e3 * cell.seconds[form]:16.3f} {1e3 * predicted[form]:11.3f}"
    return f"{text} {cell.choice.value:>14} {cell.ratio:11.2f}"


if __name__ == "__main__":
    sys.exit(main())
