"""The ledger catches a pass that claims to be exact and is not, and records what an honest one did."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from moec.artifact.ledger import CheckOutcome
from moec.artifact.options import Check
from moec.artifact.recorder import LedgerRecorder
from moec.artifact.tokens import TokenBatch, function_inputs, token_batch
from moec.dialects.builtin import WeightOp
from moec.dialects.moe import ExpertsOp
from moec.errors import VerificationError
from moec.frontend.huggingface import load_huggingface
from moec.ir import Operation
from moec.module import Module
from moec.pipeline.base import Claim, Pass, PassContext
from moec.pipeline.manager import PassManager, Pipeline
from moec.reference.executor import Executor
from moec.weights.store import WeightStore
from tests.frontend.tiny_models import save_tiny_checkpoint

RAISE = "canonicalize,cse,dce,raise-nn,raise-moe,canonicalize"


@pytest.fixture(scope="module")
def raised(tmp_path_factory: pytest.TempPathFactory) -> Module:
    """A tiny OLMoE with `moe.route`."""
    folder = tmp_path_factory.mktemp("source")
    save_tiny_checkpoint("olmoe", folder)
    module = load_huggingface(folder, WeightStore(tmp_path_factory.mktemp("store")))
    PassManager(Pipeline.parse(RAISE)).run(module.op, weights=module.weights, module=module)
    return module


def copy_of(module: Module) -> Module:
    return replace(module, op=module.op.clone())  # type: ignore[arg-type]


@dataclass(frozen=True)
class ScaleExpert(Pass):
    """Multiplies the last weight of one expert of one layer by a factor."""

    pass_name: ClassVar[str] = "scale-expert"
    claim: ClassVar[Claim] = Claim.EXACT
    layer: int = 0
    expert: int = 0
    factor: float = 1.001

    def run(self, op: Operation, context: PassContext) -> None:
        weights = context.require_weights()
        assert weights.store is not None
        experts = [found for found in op.walk() if isinstance(found, ExpertsOp)][self.layer]
        weight = experts.weights[-1].defining_op
        assert isinstance(weight, WeightOp)
        stack = weights.load(weight.source)
        stack[self.expert] *= self.factor
        weight.source = str(weights.store.put(stack))


@dataclass(frozen=True)
class HonestScaleExpert(ScaleExpert):
    """The same, and says so."""

    pass_name: ClassVar[str] = "honest-scale-expert"
    claim: ClassVar[Claim] = Claim.LOSSY


def run(module: Module, instance: Pass, check: Check) -> LedgerRecorder:
    recorder = LedgerRecorder(module, check)
    PassManager(Pipeline.of(instance), observers=[recorder]).run(module.op, weights=module.weights, module=module)
    return recorder


@pytest.mark.parametrize("check", [Check.CHANGED, Check.FULL])
@pytest.mark.parametrize("expert", range(0, 8, 3))
def test_false_claim_is_caught_and_named(raised: Module, expert: int, check: Check) -> None:
    with pytest.raises(VerificationError) as caught:
        run(copy_of(raised), ScaleExpert(layer=1, expert=expert), check)
    assert caught.value.exit_code == 4
    assert "scale-expert" in str(caught.value) and "claims to be exact" in str(caught.value)
    assert "model.layers.1" in str(caught.value)


def test_expert_that_is_never_chosen_is_named(raised: Module) -> None:
    """Its logit is the mean of the others, never among the best two, so that only steered tokens reach it."""
    module = copy_of(raised)
    assert module.weights.store is not None
    experts = [op for op in module.main.walk() if isinstance(op, ExpertsOp)][1]
    route = experts.ids.defining_op
    assert route is not None and route.operands[0].defining_op is not None
    router = route.operands[0].defining_op.operands[1].defining_op
    assert isinstance(router, WeightOp)
    rows = module.weights.load(router.source)
    rows[5] = rows[torch.arange(8) != 5].mean(0)
    router.source = str(module.weights.store.put(rows))
    with pytest.raises(VerificationError, match=r"expert 5 of model\.layers\.1"):
        run(module, ScaleExpert(layer=1, expert=5), Check.CHANGED)


def test_truthful_claims_pass(raised: Module) -> None:
    unchanged = run(copy_of(raised), ScaleExpert(layer=1, expert=2, factor=1.0), Check.CHANGED)
    assert unchanged.entries[0].outcome is CheckOutcome.WITHIN_BOUND
    lossy = run(copy_of(raised), HonestScaleExpert(layer=1, expert=2, factor=1.5), Check.CHANGED)
    (entry,) = lossy.entries
    assert entry.outcome is CheckOutcome.MEASURED and entry.claim == "lossy"
    assert [error.layer for error in entry.layer_errors] == ["model.layers.1"]
    assert 1e-4 < entry.layer_errors[0].relative_error < 1
    skipped = run(copy_of(raised), ScaleExpert(layer=1, expert=2), Check.NONE)
    assert skipped.entries[0].outcome is CheckOutcome.NOT_CHECKED


def test_what_each_lossy_pass_adds_to_the_loss(raised: Module) -> None:
    """By the definition of the loss, and the second pass counts from behind the first one."""
    module = copy_of(raised)
    recorder = LedgerRecorder(module, Check.CHANGED)
    batch = token_batch(module, rows=2, length=24)
    losses = [_loss(module, batch)]
    steps: list[Pass] = [HonestScaleExpert(factor=30.0), ScaleExpert(factor=1.0), HonestScaleExpert(1, 2, 30.0)]
    for step in steps:
        PassManager(Pipeline.of(step), observers=[recorder]).run(module.op, weights=module.weights, module=module)
        losses.append(_loss(module, batch))
    first, between, second = (entry.loss_change for entry in recorder.entries)
    assert between is None
    assert first == pytest.approx(losses[1] - losses[0], abs=6e-5) and abs(losses[1] - losses[0]) > 1e-3
    assert second == pytest.approx(losses[3] - losses[2], abs=6e-5) and abs(losses[3] - losses[2]) > 1e-3


def _loss(module: Module, batch: TokenBatch) -> float:
    """Mean -log p of the token that follows, over pairs of tokens without padding."""
    inputs = function_inputs(module.main, batch)
    logits = next(iter(Executor(module.op, module.weights, dtype=torch.float64).run(inputs).values()))
    kept = torch.from_numpy(batch.mask[:, 1:] * batch.mask[:, :-1]).bool()
    targets = torch.from_numpy(batch.ids)[:, 1:]
    return float(torch.nn.functional.cross_entropy(logits[:, :-1][kept], targets[kept]))
