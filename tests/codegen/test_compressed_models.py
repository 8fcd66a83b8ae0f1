"""What passes make of the demo model, in ONNX: it computes what the executor does, and no byte is stored twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moec.artifact.options import RAISING_PIPELINE
from moec.artifact.summary import model_size
from moec.artifact.tokens import function_inputs, token_batch
from moec.codegen.onnx.emit import emit_onnx
from moec.codegen.onnx.targets import Target
from moec.frontend.huggingface import load_huggingface
from moec.ir import DType
from moec.module import Module
from moec.pipeline.manager import PassManager, Pipeline
from moec.reference.executor import Executor
from moec.weights.store import WeightStore
from tests.codegen.running import load, run
from tests.experts.models import copy_of

DEMO = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"
PIPELINES = (
    "prune-experts{keep=5}",
    "prune-experts{keep=5 on-drop=zero}",
    "prune-experts{keep=5 on-drop=redirect}",
    "prune-experts{keep=5 on-drop=constant}",
    "prune-micro-experts{ratio=0.5}",
    "low-rank{ratio=0.4}",
    "low-rank{ratio=0.5 base=frequency}",
    "latent-factorize{ratio=0.5 sides=gate,up,down}",
    "latent-factorize{ratio=0.5 group=4}",
    "merge-experts{keep=4}",
    "reuse-experts{max-distortion=2.0}",
    "replace-auxiliary{main=1}",
    "prune-micro-experts{ratio=0.4},low-rank{ratio=0.5},prune-experts{keep=6 on-drop=constant}",
)


def run_passes(module: Module, text: str) -> None:
    PassManager(Pipeline.parse(text)).run(module.op, weights=module.weights, module=module)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Module:
    """The demo model, raised and calibrated on little text."""
    module = load_huggingface(DEMO, WeightStore(tmp_path_factory.mktemp("store")))
    run_passes(module, f"{RAISING_PIPELINE},calibrate{{sequences=8}}")
    return module


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_compressed_model(demo: Module, pipeline: str, tmp_path: Path) -> None:
    module = copy_of(demo)
    run_passes(module, f"{pipeline},canonicalize,cse,dce")
    expected, feeds, kept = logits(module)
    for target in Target:
        report = emit_onnx(module, tmp_path / target.value, target=target)
        found = next(iter(run(load(tmp_path / target.value), feeds).values()))
        assert np.abs(found - expected)[kept].max() <= 1e-5 * np.abs(expected[kept]).max()
        assert report.weight_bytes == model_size(module).bytes
        assert report.weight_bytes != model_size(demo).bytes


@pytest.mark.parametrize("target", list(Target))
def test_bands_of_neurons_in_unlike_bits(demo: Module, target: Target, tmp_path: Path) -> None:
    """Matrices joined of packed ones: the products of their bands, whose bytes are stored once."""
    module = copy_of(demo)
    run_passes(module, "allocate-bits{unit=micro bits=8,4,2 group=16},quantize{planned group=16},canonicalize,cse,dce")
    before = module.print()
    expected, feeds, kept = logits(module)
    report = emit_onnx(module, tmp_path, target=target)
    found = next(iter(run(load(tmp_path), feeds).values()))
    assert np.abs(found - expected)[kept].max() <= 1e-5 * np.abs(expected[kept]).max()
    assert model_size(module).bytes <= report.weight_bytes <= model_size(module).bytes + 64
    assert module.print() == before


def test_compressed_model_in_float16(demo: Module, tmp_path: Path) -> None:
    """Half of the bytes of every matrix; vectors stay float32."""
    module = copy_of(demo)
    run_passes(module, f"{PIPELINES[-1]},canonicalize,cse,dce")
    expected, feeds, kept = logits(module)
    whole = emit_onnx(module, tmp_path / "float32")
    half = emit_onnx(module, tmp_path / "float16", dtype=DType.F16)
    assert whole.weight_bytes / 2 < half.weight_bytes < whole.weight_bytes * 0.51
    found = next(iter(run(load(tmp_path / "float16"), feeds).values()))
    assert np.abs(found - expected)[kept].max() <= 1e-2 * np.abs(expected[kept]).max()


def logits(module: Module) -> tuple[np.ndarray, dict[str, torch.Tensor], np.ndarray]:
    """Logits [2, 24, vocabulary] of the reference executor in float64, the inputs, and which tokens are not padding."""
    batch = token_batch(module, rows=2, length=24)
    feeds = function_inputs(module.main, batch)
    with torch.no_grad():
        results = Executor(module.op, module.weights, dtype=torch.float64).run(feeds)
    return next(iter(results.values())).numpy(), feeds, batch.mask.astype(bool)
