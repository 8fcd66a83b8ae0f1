"""moec from Python: cheap to import, and the same compiler as the command line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

import moec
from moec.artifact.manifest import read_manifest
from moec.artifact.opened import Artifact
from moec.dialects.builtin import WeightOp
from moec.dialects.moe import ExpertsOp
from moec.ir import Operation
from moec.pipeline import Claim, Pass, PassContext, option, register_pass
from tests.cli.conftest import DEMO_MODEL, Command

pytestmark = pytest.mark.xdist_group("artifact")


@register_pass("test-scale-expert")
@dataclass(frozen=True)
class ScaleExpert(Pass):
    """Multiplies the last stack of one expert by a factor."""

    claim: ClassVar[Claim] = Claim.LOSSY
    expert: int = option("which expert", 5)
    factor: float = option("by how much", 1.5)

    def run(self, op: Operation, context: PassContext) -> None:
        weights = context.require_weights()
        assert weights.store is not None
        experts = next(found for found in op.walk() if isinstance(found, ExpertsOp))
        weight = experts.weights[-1].defining_op
        assert isinstance(weight, WeightOp)
        stack = weights.load(weight.source)
        stack[self.expert] *= self.factor
        weight.source = str(weights.store.put(stack))


def test_import_is_cheap() -> None:
    code = "import moec, sys; assert not {'torch', 'onnx', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = moec.nothing  # type: ignore[attr-defined]


def test_load_and_run_passes() -> None:
    module = moec.load(DEMO_MODEL)
    report = moec.run_passes(module, "canonicalize,cse,dce,raise-nn,raise-moe")
    assert module.operation_counts()["moe.route"] == 4
    assert [record.text for record in report.records][-1] == "raise-moe"
    assert "moe.experts" in module._repr_html_()


@pytest.mark.slow
def test_a_lossy_pass_is_measured_and_its_artifact_verifies(moec_command: Command, tmp_path: Path) -> None:
    pipeline = "test-scale-expert{expert=2}"
    result = moec.compile(DEMO_MODEL, tmp_path / "out", pipeline=pipeline, store=tmp_path / "store")
    entry = next(line for line in result.manifest.ledger if line.claim == "lossy")
    assert entry.outcome.value == "measured"
    assert [error.layer for error in entry.layer_errors] == ["model.layers.0"]
    assert 1e-3 < entry.layer_errors[0].relative_error < 1
    assert read_manifest(tmp_path / "out") == result.manifest
    assert Artifact.open(tmp_path / "out").title == "tiny-moe"
    code, out, err = moec_command("verify", tmp_path / "out", "--store", tmp_path / "store")
    assert code == 0, err
    assert "IR against source" not in out
    code, _, err = moec_command("verify", tmp_path / "out", "--store", tmp_path / "elsewhere")
    assert code == 2
    assert "store" in err


def test_values_that_an_option_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float64"):
        moec.compile(DEMO_MODEL, tmp_path / "out", dtype="float64")
