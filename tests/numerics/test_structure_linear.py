"""structure-linear: exact at full rank, the nearest factors below it, numbers counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import moec
from moec.artifact.summary import model_size
from moec.artifact.tokens import function_inputs, token_batch
from moec.codegen.onnx.targets import parse_target
from moec.dialects.builtin import WeightOp
from moec.errors import UsageError
from moec.module import Module
from moec.passes.structuring.factors import block_dense, block_shuffle, low_rank
from moec.pipeline.manager import PipelineReport
from moec.reference.executor import Executor
from tests.codegen.running import emit_and_run
from tests.experts.models import copy_of, difference, output, raised_model


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Module:
    """64 hidden channels; blocks of width 96 without biases, and of width 256 with biases."""
    return raised_model(request.param, tmp_path_factory.mktemp(request.param))


def changed(source: Module, options: str) -> tuple[Module, PipelineReport]:
    module = copy_of(source)
    return module, moec.run_passes(module, f"structure-linear{{{options}}}")


@pytest.mark.parametrize(
    "options",
    [
        "ratio=2 parts=feed-forward,other,outside",
        "structure=block-dense rank=64 blocks=1",
        "structure=block-shuffle rank=16",
        "rank=3 guide=1",
    ],
)
def test_full_rank_and_a_full_guide_are_the_dense_model(dense: Module, options: str) -> None:
    module, _ = changed(dense, options)
    assert difference(output(dense), output(module)) < 1e-9


@pytest.mark.parametrize(
    ("options", "blocks", "rank"),
    [("rank=16", 1, 16), ("structure=block-dense rank=16", 4, 4), ("structure=block-shuffle rank=2", 4, 2)],
)
def test_the_model_computes_with_the_products_of_its_factors(
    dense: Module, options: str, blocks: int, rank: int, tmp_path: Path
) -> None:
    module, report = changed(dense, options)
    make = {"rank": low_rank, "stru": block_shuffle if "shuffle" in options else block_dense}[options[:4]]
    expected = copy_of(dense)
    count = before = 0
    for op in expected.op.walk():
        if isinstance(op, WeightOp) and "mlp" in op.weight_name and len(op.value.type.static_shape) == 2:  # type: ignore[attr-defined]
            matrix = expected.weights.load(op.source).double()
            turned = matrix.T if "transformer.h" in op.weight_name else matrix
            factors = make(turned, rank) if make is low_rank else make(turned, blocks, rank)  # type: ignore[arg-type,call-arg]
            product = factors.product()
            op.source = str(expected.weights.store.put(product.T if turned is not matrix else product))  # type: ignore[union-attr]
            count, before = count + factors.numel, before + matrix.numel()
    assert difference(output(expected), output(module)) < 1e-9
    assert report.records[0].statistics["after"] == count and report.records[0].statistics["before"] == before
    assert model_size(dense).active_flops - model_size(module).active_flops == 2 * (before - count)
    feeds = function_inputs(module.main, token_batch(module, rows=2, length=24))
    for target in ("portable", "ort-cpu"):
        got, _ = emit_and_run(module, feeds, tmp_path / target, target=parse_target(target))
        with torch.no_grad():
            logits = Executor(module.op, module.weights).run(feeds)["logits"].numpy()
        real = feeds["attention_mask"].bool().numpy()
        assert np.abs(got["logits"] - logits)[real].max() < 1e-4 * np.abs(logits).max()


def test_factors_are_the_nearest_ones() -> None:
    matrix = torch.randn(24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lost = torch.linalg.svdvals(matrix)[5:].square().sum().sqrt()
    assert torch.allclose((matrix - low_rank(matrix, 5).product()).norm(), lost)
    parts = [torch.linalg.svdvals(part)[2:].square().sum() for part in matrix.chunk(4, dim=1)]
    found = block_dense(matrix, 4, 2)
    assert torch.allclose((matrix - found.product()).norm(), torch.stack(parts).sum().sqrt())
    assert found.numel == 24 * 8 + 8 * 4
    shuffled = block_shuffle(matrix, 4, 1)
    grid = [torch.linalg.svdvals(part)[1:].square().sum() for rows in matrix.chunk(4) for part in rows.chunk(4, dim=1)]
    assert torch.allclose((matrix - shuffled.product()).norm(), torch.stack(grid).sum().sqrt())
    assert shuffled.numel == 4 * (24 + 16)
    for whole in (low_rank(matrix, 16), block_dense(matrix, 4, 4), block_shuffle(matrix, 4, 4)):
        assert torch.allclose(whole.product(), matrix)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("rank=65", "rank 65 is larger than 64"),
        ("structure=block-dense rank=8 blocks=5", "5 blocks do not divide 64 inputs"),
        ("structure=block-dense rank=6", "4 blocks do not divide rank 6"),
    ],
)
def test_what_does_not_fit_is_refused(dense: Module, options: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        changed(dense, options)
