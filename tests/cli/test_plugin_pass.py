"""A pass of another package inside `moec compile`: the ledger measures it, and catches one that claims too much."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.frontend.tiny_models import save_tiny_checkpoint
from tests.passes.plugins import HEAD, install, pass_source

SCALE_ONE_EXPERT = '''
from moec.dialects.moe import ExpertsOp


@register_pass("{name}")
@dataclass(frozen=True)
class {class_name}(Pass):
    """Scales one expert of the last layer."""

    claim: ClassVar[Claim] = Claim.{claim}
    scaled = Statistic("experts scaled")
    expert: int = option("which one", 3)
    factor: float = option("by how much", 1.001)

    def run(self, op, context):
        weights = context.require_weights()
        experts = [found for found in op.walk() if isinstance(found, ExpertsOp)][-1]
        down = experts.weights[-1].defining_op
        stack = weights.load(down.source)
        stack[self.expert] *= self.factor
        down.source = str(weights.store.put(stack))
        context.count(self.scaled)
'''


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint("mixtral", tmp_path_factory.mktemp("source") / "mixtral")


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = SCALE_ONE_EXPERT.format(name="scale-quietly", class_name="Quietly", claim="EXACT")
    source += SCALE_ONE_EXPERT.format(name="scale-openly", class_name="Openly", claim="LOSSY")
    source += pass_source("fail", "weights = context.require_weights(); raise LookupError(context.module.source.kind)")
    points = {"scale-quietly": "Quietly", "scale-openly": "Openly", "fail": "ThePass"}
    install(tmp_path / "plugin", monkeypatch, "scaling-passes", source, points)


def test_a_pass_that_claims_too_much_is_caught(checkpoint: Path, tmp_path: Path, moec: Command) -> None:
    out, crash = tmp_path / "out", tmp_path / "crash.mlir"
    code, _, errors = moec("compile", checkpoint, "-o", out, "--pipeline", "scale-quietly", "--reproducer", crash)
    assert code == 4, errors
    assert "scale-quietly" in errors and "claims" in errors and "layers." in errors
    assert not out.exists()


def test_one_that_says_so_is_measured(checkpoint: Path, tmp_path: Path, moec: Command) -> None:
    out = tmp_path / "out"
    code, printed, errors = moec(
        "compile", checkpoint, "-o", out, "--pipeline", "scale-openly{factor=1.01}", "--no-verify", "--time-passes"
    )
    assert code == 0, errors
    assert "scale-openly{factor=1.01}" in printed
    ledger = json.loads((out / "moec.json").read_text(encoding="utf-8"))["ledger"]
    entry = next(entry for entry in ledger if entry["pass_text"] == "scale-openly{factor=1.01}")
    assert entry["claim"] == "lossy" and entry["outcome"] == "measured"
    assert [error["layer"] for error in entry["layer_errors"]]
    assert all(0 < error["relative_error"] < 0.1 for error in entry["layer_errors"])


@pytest.mark.slow
def test_a_failure_leaves_a_reproducer_that_finds_the_weights(checkpoint: Path, tmp_path: Path, moec: Command) -> None:
    out, crash = tmp_path / "out", tmp_path / "crash.mlir"
    code, _, errors = moec(
        "compile", checkpoint, "-o", out, "--pipeline", "fail", "--check", "none", "--reproducer", crash
    )
    message = "pass fail of the distribution scaling-passes failed with LookupError: decoder"
    assert code == 1 and message in errors and not out.exists()
    code, _, errors = moec("opt", crash, "--run-reproducer", "--source", checkpoint)
    assert code == 1 and message in errors
    code, _, errors = moec("opt", crash, "--run-reproducer")
    assert code == 1 and "the IR was given as text alone" in errors and "--source" in errors


def test_a_pass_in_a_file_is_known_to_the_command_that_loads_it(
    checkpoint: Path, tmp_path: Path, moec: Command
) -> None:
    file, out = tmp_path / "scaling_in_a_file.py", tmp_path / "out"
    source = SCALE_ONE_EXPERT.format(name="scale-from-file", class_name="FromFile", claim="LOSSY")
    file.write_text(HEAD + source, encoding="utf-8")
    pipeline = ("--pipeline", "scale-from-file")
    code, _, errors = moec("compile", checkpoint, "-o", out, *pipeline)
    assert code == 2 and "there is no pass 'scale-from-file'" in errors
    plugin = ("--load-pass-plugin", file)
    assert moec("plan", checkpoint, *pipeline, *plugin)[0] == 0
    code, _, errors = moec("compile", checkpoint, "-o", out, *pipeline, *plugin)
    assert code == 0, errors
    code, _, errors = moec("verify", out, *plugin)
    assert code == 0, errors
    code, _, errors = moec("compile", checkpoint, "-o", tmp_path / "other", "--load-pass-plugin", "nowhere.py")
    assert code == 2 and "the plug-in nowhere.py fails on import" in errors
