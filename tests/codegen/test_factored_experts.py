"""Models after low-rank, latent-factorize and replace-auxiliary: both targets compute them, at the account's bytes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

import moec
from moec.artifact.summary import model_size
from moec.artifact.tokens import function_inputs, token_batch
from moec.codegen.onnx.emit import emit_onnx
from moec.codegen.onnx.targets import Target
from moec.dialects.moe import ExpertsOp
from moec.ir import verify
from moec.module import Module
from tests.codegen.running import assert_close, load, reference, run
from tests.experts.models import calibrate_text, copy_of, raised_model

FACTORS = {
    "factors": "low-rank{ratio=0.5}",
    "factors of some energy": "low-rank{energy=0.8 sides=up,down}",
    "differences to a base": "low-rank{ratio=0.5 base=frequency}",
    "some neurons whole": "low-rank{rank=3 residual=0.2}",
    "a latent space": "latent-factorize{ratio=0.5 sides=gate,up,down}",
    "latent spaces of groups": "latent-factorize{rank=4 group=4 sides=gate,down}",
}
MODULES = {
    "modules": "replace-auxiliary{main=1 rank=2}",
    "modules beside scaled gates": "replace-auxiliary{main=1 rank=2 base=renorm}",
    "modules beside own gates": "replace-auxiliary{main=1 rank=2 base=skip}",
    "constants": "replace-auxiliary{main=1 module=constant}",
    "one expert": "replace-auxiliary{main=1 module=none base=renorm}",
    "factors and modules": "low-rank{ratio=0.5},replace-auxiliary{main=1 rank=2}",
}
# gpt_oss has biases. The gates of mixtral are normalised, those of deepseek_v3 and qwen2_moe are not, or scaled.
CASES = {
    f"{model_type}: {name}": (model_type, pipeline)
    for model_type, pipelines in {
        "mixtral": FACTORS | MODULES,
        "gpt_oss": FACTORS,
        "qwen2_moe": MODULES,
        "deepseek_v3": MODULES,
    }.items()
    for name, pipeline in pipelines.items()
}


@cache
def calibrated(model_type: str, folder: Path) -> Module:
    module = raised_model(model_type, folder)
    moec.run_passes(module, calibrate_text(folder))
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(("model_type", "pipeline"), CASES.values(), ids=list(CASES))
def test_both_targets_compute_what_the_executor_computes(
    model_type: str, pipeline: str, folder: Path, tmp_path: Path
) -> None:
    source = calibrated(model_type, folder / model_type)
    module = copy_of(source)
    moec.run_passes(module, f"{pipeline},canonicalize,cse,dce")
    verify(module.op)
    batch = token_batch(module, rows=2, length=19)
    feeds, real = function_inputs(module.main, batch), batch.mask.astype(bool)
    [before], [after] = (list(reference(each, feeds).values()) for each in (source, module))
    assert np.isfinite(after[real]).all() and not np.allclose(before[real], after[real], atol=1e-4)
    for target in Target:
        report = emit_onnx(module, tmp_path / target.value, target=target)
        assert report.weight_bytes == model_size(module).bytes
        [found] = run(load(tmp_path / target.value), feeds).values()
        assert_close(found[real], after[real], 2e-5)


def test_a_main_layer_with_scaled_gates_keeps_the_fused_operator(folder: Path, tmp_path: Path) -> None:
    module = copy_of(calibrated("mixtral", folder / "mixtral"))
    moec.run_passes(module, "replace-auxiliary{main=1 rank=2 base=renorm},dce")
    report = emit_onnx(module, tmp_path, target=Target.ORT_CPU)
    layers = [op for op in module.op.walk() if isinstance(op, ExpertsOp)]
    fused = [lowering.layer for lowering in report.layers if lowering.parity is not None]
    assert len(fused) == len(layers) / 2 and not any(name.endswith("auxiliary") for name in fused)
