"""tune: what is trained and what is not, on a tiny random model; whether it helps is tested on a trained one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import moec
from moec.artifact.options import RAISING_PIPELINE
from moec.dialects.builtin import WeightOp
from moec.errors import UsageError
from moec.experts import find_moe_layers
from moec.experts.router_source import router_weights
from moec.frontend.huggingface import load_huggingface
from moec.module import Module
from moec.passes.routing.training import divergence, next_token_loss
from moec.pipeline.manager import PipelineReport
from moec.weights.store import WeightStore
from tests.experts.models import copy_of, raised_model
from tests.frontend.tiny_models import VOCABULARY_SIZE

DENSE_MODEL = Path(__file__).parents[2] / "examples" / "models" / "tiny-dense"
STEPS = "steps=4 batch=4 length=16 rate=0.005"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return raised_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def sparse(dense: Module) -> Module:
    module = copy_of(dense)
    moec.run_passes(module, "factorize{experts=4},init-router{kind=random deviation=1},set-routing{k=2}")
    return module


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that a few steps can learn: few tokens, in a pattern."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, np.tile(np.arange(8), 64) % VOCABULARY_SIZE)
    return path


def tuned(source: Module, options: str, tokens: Path) -> tuple[Module, PipelineReport]:
    module = copy_of(source)
    return module, moec.run_passes(module, f"tune{{{STEPS} {options}}}", calibration=tokens)


def sources(module: Module) -> dict[str, str]:
    return {op.weight_name: op.source for op in module.op.walk() if isinstance(op, WeightOp)}


def router_names(module: Module) -> set[str]:
    return {weight.weight_name for layer in find_moe_layers(module.op) for weight in router_weights(layer)}


def changes(before: Module, after: Module) -> set[str]:
    old, new = sources(before), sources(after)
    assert set(old) == set(new)
    return {name for name, source in new.items() if source != old[name]}


@pytest.mark.slow
def test_routers_alone(sparse: Module, tokens: Path) -> None:
    module, report = tuned(sparse, "train=router", tokens)
    numbers = report.records[-1].statistics
    # a random router may be the best one that four steps find
    assert changes(sparse, module) <= router_names(module)
    assert numbers["source-before"] == numbers["source-after"] > 0
    assert numbers["loss-after"] <= numbers["loss-before"]


def test_routers_and_experts(sparse: Module, tokens: Path) -> None:
    routed, report = tuned(sparse, "target=text", tokens)
    numbers = report.records[-1].statistics
    assert numbers["loss-after"] < numbers["loss-before"] and numbers["source-after"] < numbers["source-before"]
    found = changes(sparse, routed)
    assert router_names(routed) <= found and all("router" in name or ".mlp." in name for name in found)
    assert numbers["changed"] == len(found)
    remark = str(report.records[-1].remarks[0])
    assert "after 4 steps; the source after as many" in remark and "of the gap to it" in remark


def test_the_source_has_nothing_to_learn_from_itself(sparse: Module, tokens: Path) -> None:
    routed, report = tuned(sparse, "", tokens)
    numbers = report.records[-1].statistics
    assert changes(sparse, routed) and numbers["loss-after"] < numbers["loss-before"]
    assert numbers["source-before"] == numbers["source-after"]


@pytest.mark.slow
def test_equal_seeds_give_equal_weights(sparse: Module, tokens: Path) -> None:
    assert sources(tuned(sparse, "", tokens)[0]) == sources(tuned(sparse, "", tokens)[0])


@pytest.mark.slow
def test_everything_may_be_trained_but_frozen_routers(sparse: Module, tokens: Path) -> None:
    frozen = copy_of(sparse)
    moec.run_passes(frozen, "init-router{kind=frozen-random}")
    module, report = tuned(frozen, "train=all balance=0.01", tokens)
    assert changes(frozen, module) == set(sources(module)) - router_names(module)
    assert {refusal.reason for refusal in report.records[-1].refusals} == {"its router is frozen"}


def test_losses_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, wanted = torch.randn(2, 2, 5, 7, generator=generator)
    ids = torch.randint(0, 7, (2, 5), generator=generator)
    log_p = logits.log_softmax(-1)
    by_hand = [-float(log_p[row, at, ids[row, at + 1]]) for row in range(2) for at in range(4)]
    assert float(next_token_loss(logits, ids)) == pytest.approx(np.mean(by_hand), rel=1e-5)
    q = wanted.softmax(-1)
    assert float(divergence(logits, wanted)) == pytest.approx(float((q * (q.log() - log_p)).sum(-1).mean()), rel=1e-4)


def test_what_cannot_be_tuned_is_refused(dense: Module, sparse: Module, tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no experts to tune"):
        tuned(dense, "", tokens)
    short = tmp_path / "short.npy"
    np.save(short, np.arange(64) % VOCABULARY_SIZE)
    with pytest.raises(UsageError, match=r"4 windows of 16 tokens to tune on.*256 tokens or more"):
        tuned(sparse, "", short)


@pytest.mark.slow
def test_a_trained_model_gets_back_most_of_what_the_experts_cost(tmp_path: Path) -> None:
    """At half of the experts 120 steps close half of the gap to the source after as many steps, on the texts' ends."""
    module = load_huggingface(DENSE_MODEL, WeightStore(tmp_path / "store"))
    moec.run_passes(
        module,
        f"{RAISING_PIPELINE},factorize{{experts=8}},calibrate,init-router,set-routing{{k=4 scale=calibrated}}",
    )
    report = moec.run_passes(module, "tune{target=text steps=120 sequences=1000}")
    numbers = {name: number / 1e6 for name, number in report.records[-1].statistics.items()}
    assert numbers["source-after"] < numbers["source-before"]
    gap = numbers["loss-before"] - numbers["source-after"]
    assert numbers["loss-before"] - numbers["loss-after"] >= 0.5 * gap > 0


@pytest.mark.slow
def test_scales_of_packed_weights(sparse: Module, tokens: Path) -> None:
    """EfficientQAT, end to end: codes and zero points stay, and the loss falls."""
    packed = copy_of(sparse)
    moec.run_passes(packed, "quantize{bits=2 group=8}")
    module, report = tuned(packed, "train=scales target=text", tokens)
    numbers = report.records[-1].statistics
    changed = changes(packed, module)
    assert changed and all(name.endswith(".scales") for name in changed)
    assert numbers["loss-after"] < numbers["loss-before"]
    assert numbers["source-before"] == numbers["source-after"]
