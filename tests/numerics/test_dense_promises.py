"""What holds for every pass that makes experts of a dense model or rewrites it: equal inputs give equal models, both
ONNX targets compute what the reference does, and a second run finds nothing to do or is refused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import moec
from moec.artifact.tokens import function_inputs, token_batch
from moec.codegen.onnx.targets import parse_target
from moec.dialects.builtin import WeightOp
from moec.errors import MoecError
from moec.ir import DType, TensorType, structural_difference
from moec.module import Module
from moec.reference.executor import Executor
from tests.codegen.running import emit_and_run
from tests.experts.models import calibrate_text, copy_of, difference, output, raised_model

pytestmark = pytest.mark.slow

PIPELINES = (
    "factorize{experts=4}",
    "factorize{experts=4 partition=co-activation shared=32}",
    "factorize{target=attention-heads experts=2}",
    "factorize{experts=4},init-router,set-routing{k=2 scale=calibrated}",
    "factorize{experts=4},init-router{kind=hidden-layer},train-router{labels=activation loss=bce epochs=2}",
    "factorize{experts=4},init-router{kind=token-table},set-routing{k=2 scope=model}",
    "upcycle{experts=3 perturb=drop}",
    "upcycle{experts=2 granularity=4}",
    "upcycle{experts=2 kind=ternary shared=seed scale=0.5}",
    "sparsify-ffn{keep=0.25}",
    "sparsify-ffn{kind=statistical keep=0.25}",
    "structure-linear{ratio=0.5}",
    "share-layers{group=2 taken=average}",
    "fold-norms",
)
ONCE = tuple(pipeline for pipeline in PIPELINES if "init-router" not in pipeline)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Module:
    module = raised_model("llama", tmp_path_factory.mktemp("llama"), stored=torch.bfloat16)
    moec.run_passes(module, calibrate_text(tmp_path_factory.mktemp("tokens"), rows=80))
    return module


def changed(source: Module, pipeline: str, seed: int = 0) -> Module:
    module = copy_of(source)
    moec.run_passes(module, pipeline, seed=seed)
    return module


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_equal_inputs_give_equal_models_of_finite_numbers(llama: Module, pipeline: str) -> None:
    one, again = changed(llama, pipeline), changed(llama, pipeline)
    assert one.print() == again.print()
    assert output(one).isfinite().all()


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_what_else_is_in_the_batch_changes_nothing(llama: Module, pipeline: str) -> None:
    module = changed(llama, pipeline)
    feeds = function_inputs(module.main, token_batch(module, rows=2, length=24))
    executor = Executor(module.op, module.weights, dtype=torch.float64)
    with torch.no_grad():
        together = executor.run(feeds)["logits"]
        for row in range(2):
            alone = executor.run({name: value[row : row + 1] for name, value in feeds.items()})["logits"]
            real = feeds["attention_mask"][row].bool()
            assert difference(together[row][real], alone[0][real]) < 1e-9


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_both_onnx_targets_compute_what_the_pass_made(llama: Module, pipeline: str, tmp_path: Path) -> None:
    module = changed(llama, pipeline)
    feeds = function_inputs(module.main, token_batch(module, rows=2, length=24))
    real = feeds["attention_mask"].bool().numpy()
    expected = output(module, torch.float32).numpy()
    for target in ("portable", "ort-cpu"):
        got, _ = emit_and_run(module, feeds, tmp_path / target, target=parse_target(target))
        assert np.abs(got["logits"] - expected)[real].max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_element_types_stay(llama: Module, pipeline: str) -> None:
    """The module's, whatever its file stores, and the stored ones: bfloat16 that is moved is not rounded or widened."""
    module = changed(llama, pipeline)
    weights = [op for op in module.op.walk() if isinstance(op, WeightOp)]
    assert {op.value.type.dtype for op in weights if isinstance(op.value.type, TensorType)} == {DType.F32}
    source = {op.weight_name: op.source for op in llama.op.walk() if isinstance(op, WeightOp)}
    assert all(text.startswith("cast(") for text in source.values())
    assert any(op.source == source.get(op.weight_name) for op in weights)
    if pipeline.startswith("factorize") or "granularity" in pipeline:
        moved = [module.weights.load(op.source) for op in weights if "router" not in op.weight_name]
        assert all(torch.equal(value, value.bfloat16().float()) for value in moved)


@pytest.mark.parametrize("pipeline", ONCE)
def test_a_second_run_changes_nothing_or_is_refused(llama: Module, pipeline: str) -> None:
    module = changed(llama, pipeline)
    try:
        again = changed(module, pipeline)
    except MoecError as error:
        assert error.hint or error.message
    else:
        assert structural_difference(module.op, again.op) is None
