"""What a calibration takes beyond running the model: CPU time, and memory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

import moec
from moec.artifact.memory import MemoryWatch, anonymous_bytes, give_back_freed_memory
from moec.artifact.options import RAISING_PIPELINE
from moec.artifact.tokens import TokenBatch, function_inputs
from moec.frontend.huggingface import load_huggingface
from moec.module import Module
from moec.reference.executor import Executor
from tests.frontend.tiny_models import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("calibration cost")]

SEQUENCES, LENGTH, BATCH = 64, 64, 16
LAYERS = 8
FORWARD_PASSES = 2.5
"""The most that first-order statistics may cost, in runs of the model on the same tokens."""


def build(path: Path, width: int) -> Path:
    """A model in bfloat16 with experts of 25 MB a layer in float32, as they are computed, for each 1024 of width."""
    sizes = {"hidden_size": 256, "intermediate_size": width, "num_local_experts": 8, "num_experts_per_tok": 2}
    model = tiny_model("mixtral", num_hidden_layers=LAYERS, **sizes)
    model.to(torch.bfloat16).save_pretrained(str(path))
    ids = torch.randint(3, 60, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    (path / "tokens.json").write_text(json.dumps(ids.tolist()))
    return path


def raised(folder: Path) -> Module:
    module = load_huggingface(folder, None)
    moec.run_passes(module, RAISING_PIPELINE)
    return module


def calibrate(module: Module, folder: Path) -> None:
    moec.run_passes(
        module, f"calibrate{{tokens={folder / 'tokens.json'} length={LENGTH} batch={BATCH} reservoir=1024}}"
    )


def cpu_seconds(run: Callable[[], None], times: int = 3) -> float:
    """The least of several runs."""
    found = []
    for _ in range(times):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def test_first_order_statistics_cost_few_forward_passes(tmp_path: Path) -> None:
    folder = build(tmp_path, 1024)
    module = raised(folder)
    ids = np.array(json.loads((folder / "tokens.json").read_text()), np.int64)

    def forward() -> None:
        executor = Executor(module.op, module.weights, keep_weights=True)
        with torch.no_grad():
            for start in range(0, SEQUENCES, BATCH):
                part = ids[start : start + BATCH]
                executor.run(function_inputs(module.main, TokenBatch(part, np.ones_like(part))))

    once = cpu_seconds(forward)
    taken = cpu_seconds(lambda: calibrate(module, folder))
    print(f"{taken / once:.2f} forward passes ({taken:.2f} s of {once:.2f} s)")
    assert taken <= FORWARD_PASSES * once


def growth(folder: Path, small: Path) -> int:
    """Bytes of anonymous memory that a calibration adds at its peak, after one of a small model loaded the code."""
    give_back_freed_memory()
    calibrate(raised(small), small)
    module = raised(folder)
    before = anonymous_bytes()
    with MemoryWatch(0.01) as watch:
        calibrate(module, folder)
    return watch.peak - before


def test_memory_stays_at_about_one_layer(tmp_path: Path) -> None:
    """Layers are large here beside the hidden states of all tokens and the rows that are kept, about 35 MB."""
    folder = build(tmp_path / "large", 4096)
    tiny_model("mixtral").save_pretrained(str(tmp_path))
    (tmp_path / "tokens.json").write_text((folder / "tokens.json").read_text())
    # a process of its own: memory that an earlier run freed but kept would serve unseen
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        grown = process.submit(growth, folder, tmp_path).result()
    layer = 2 * (folder / "model.safetensors").stat().st_size / LAYERS
    print(f"{grown / layer:.2f} layers of {LAYERS}")
    assert 0.5 * layer < grown < 2 * layer
