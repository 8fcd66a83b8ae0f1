"""find-knee on a tiny model: against losses of sparse copies by hand, and the model stays as it was."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import moec
from moec.artifact.tokens import function_inputs
from moec.errors import UsageError
from moec.module import Module
from moec.pipeline.manager import PassManager, Pipeline
from moec.reference.executor import Executor
from tests.experts.models import calibrate_text, copy_of, raised_model


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Module:
    folder = tmp_path_factory.mktemp("mixtral")
    module = raised_model("mixtral", folder)
    moec.run_passes(module, calibrate_text(folder))
    return module


def loss(module: Module) -> float:
    """Mean loss on the calibration tokens."""
    assert module.calibration is not None
    (batch,) = module.calibration.data.batches(100, padding_in_front=False)
    with torch.no_grad():
        logits = next(iter(Executor(module.op, module.weights).run(function_inputs(module.main, batch)).values()))
    targets = torch.from_numpy(batch.ids[:, 1:])
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].double().flatten(0, 1), targets.flatten()))


def test_the_losses_are_those_of_sparse_copies(mixtral: Module) -> None:
    module = copy_of(mixtral)
    before = module.print()
    report = PassManager(Pipeline.parse("find-knee{step=0.4 tolerance=10}")).run(
        module.op, weights=module.weights, module=module
    )
    assert module.print() == before
    assert report.records[0].statistics == {"knee": 80, "measured": 2}
    text = report.explanation_text()
    assert "80% of the expert weights can be zero" in text and "the largest share that was tried" in text
    source = loss(mixtral)
    assert float(re.findall(r"loss ([\d.]+)", text)[0]) == pytest.approx(source, abs=1e-4)
    for share, increase in re.findall(r"(\d+)% ([+-][\d.]+)", text):
        sparse = copy_of(mixtral)
        moec.run_passes(sparse, f"nm-sparsify{{pattern=global ratio={int(share) / 100}}}")
        assert float(increase) == pytest.approx(loss(sparse) - source, abs=2e-4)


def test_the_knee_is_below_the_first_share_that_costs_too_much(mixtral: Module) -> None:
    module = copy_of(mixtral)
    report = PassManager(Pipeline.parse("find-knee{step=0.45 tolerance=0}")).run(
        module.op, weights=module.weights, module=module
    )
    increases = [float(value) for value in re.findall(r"% ([+-][\d.]+)", report.explanation_text())]
    assert all(value <= 0 for value in increases[:-1])
    assert report.records[0].statistics["knee"] == 45 * sum(value <= 0 for value in increases)


def test_text_without_a_next_token_is_refused(mixtral: Module, tmp_path: Path) -> None:
    module = copy_of(mixtral)
    moec.run_passes(module, calibrate_text(tmp_path, rows=3, length=1))
    with pytest.raises(UsageError, match="no token that another one predicts"):
        moec.run_passes(module, "find-knee")
