"""init-router: weights, features and tables that rank experts without training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import moec
from moec.artifact.options import RAISING_PIPELINE
from moec.dialects.builtin import WeightOp
from moec.errors import MoecError
from moec.experts import FeedForward, MoeLayer, find_moe_layers, load_expert, run_layer
from moec.experts.router_source import is_frozen
from moec.frontend.huggingface import load_huggingface
from moec.ir import BlockArgument, Value
from moec.module import Module
from moec.passes.router_init.prompts import ExpertPrompts, PromptMode, prompt_rows
from moec.passes.router_init.solutions import (
    FitTarget,
    domain_rows,
    expert_importance,
    fit_target,
    medoids,
    token_table,
)
from moec.reference.executor import Executor
from moec.weights.store import WeightStore
from tests.codegen.running import assert_close, emit_and_run
from tests.experts.models import calibrate_text, copy_of, difference, output, raised_model

EXACT = 1e-9
DENSE_MODEL = Path(__file__).parents[2] / "examples" / "models" / "tiny-dense"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Module:
    module = raised_model("llama", tmp_path_factory.mktemp("llama"))
    text = calibrate_text(tmp_path_factory.mktemp("tokens"), rows=80, length=32)
    moec.run_passes(module, f"factorize{{experts=6}},{text}")
    return module


def changed(source: Module, pipeline: str, seed: int = 0) -> Module:
    module = copy_of(source)
    moec.run_passes(module, pipeline, seed=seed)
    return module


def router_weight(layer: MoeLayer, module: Module) -> torch.Tensor:
    weight = layer.router.tensor("weight").defining_op
    assert isinstance(weight, WeightOp)
    return module.weights.load(weight.source)


def logits_of(module: Module) -> tuple[MoeLayer, torch.Tensor, torch.Tensor]:
    """The first layer, the calibration's rows in front of it, and its logits of them."""
    layer = find_moe_layers(module.op)[0]
    assert module.calibration is not None
    sample = module.calibration.sample(layer)
    run = run_layer(layer, module.weights, sample.x, sample.router_input, with_experts=False)
    return layer, sample.x, run.logits


def feeds(module: Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "position_ids": positions.clone()}
    return {name: given[name] for name in module.main.arg_names}


def assert_runs_as_onnx(module: Module, folder: Path) -> None:
    tokens = torch.randint(0, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    given = feeds(module, tokens)
    found, _ = emit_and_run(module, given, folder)
    with torch.no_grad():
        assert_close(found["logits"], Executor(module.op, module.weights).run(given)["logits"].numpy(), 1e-4)


def test_groups_have_equal_rows_and_no_ties(llama: Module) -> None:
    module = changed(llama, "init-router{kind=group shards=3 deviation=1}")
    rows = router_weight(find_moe_layers(module.op)[0], module)
    assert torch.equal(rows[:3], rows[:1].expand(3, -1)) and torch.equal(rows[3:], rows[3:4].expand(3, -1))
    assert not torch.equal(rows[0], rows[3])
    with pytest.raises(MoecError, match="4 shards do not divide 6"):
        changed(llama, "init-router{kind=group shards=4}")


def test_frozen_routers_are_random_ones_with_a_mark(llama: Module) -> None:
    module, plain = changed(llama, "init-router{kind=frozen-random}"), changed(llama, "init-router{kind=random}")
    for layer, other in zip(find_moe_layers(module.op), find_moe_layers(plain.op), strict=True):
        assert is_frozen(layer) and not is_frozen(other)
        assert torch.equal(router_weight(layer, module), router_weight(other, plain))
    assert len({op.weight_name for op in module.op.walk() if isinstance(op, WeightOp)}) == sum(
        isinstance(op, WeightOp) for op in module.op.walk()
    )


def test_representative_neurons_decide(llama: Module, tmp_path: Path) -> None:
    module = changed(llama, "init-router{kind=representative-neuron}")
    layer, x, logits = logits_of(module)
    experts = [load_expert(layer, module.weights, number) for number in range(6)]
    for number, expert in enumerate(experts):
        assert isinstance(expert, FeedForward) and expert.gate is not None
        gate, up = (torch.nn.functional.normalize(part.dense(), dim=1) for part in (expert.gate, expert.up))
        scores = (torch.nn.functional.silu(x.float() @ gate.T) * (x.float() @ up.T)).abs()
        # one of the expert's own neurons
        distance = (scores - logits[:, number : number + 1]).abs().amax(0)
        assert float(distance.min()) < 1e-5 < float(distance.median())
    assert difference(output(llama), output(module)) < EXACT
    fewer = changed(module, "set-routing{k=2 scale=calibrated}")
    assert all(layer.route.routing.scale > 0 for layer in find_moe_layers(fewer.op))
    assert_runs_as_onnx(fewer, tmp_path / "onnx")
    again = changed(fewer, "prune-experts{criterion=random ratio=0.34}")
    assert [layer.outputs for layer in find_moe_layers(again.op)] == [4] * len(find_moe_layers(again.op))
    assert_runs_as_onnx(again, tmp_path / "pruned")


def test_the_medoid_is_the_neuron_most_like_its_expert() -> None:
    """Neuron 1 is active where the expert's neurons are, neuron 0 elsewhere, neuron 2 never."""
    common = torch.arange(40) % 2 == 0
    marks = torch.stack([~common & (torch.arange(40) < 4), common, torch.zeros(40, dtype=torch.bool), common], 1)
    assert medoids(torch.cat([marks, marks[:, [0, 2]]], 1), [4, 2]) == [1, 0]


def test_a_hidden_layer_starts_as_the_centroids(llama: Module, tmp_path: Path) -> None:
    module = changed(llama, "init-router{kind=hidden-layer},set-routing{k=3 scale=calibrated}")
    logits = logits_of(module)[2]
    plain = changed(llama, "init-router{kind=weight-centroid}")
    assert torch.allclose(logits, logits_of(plain)[2].tanh(), atol=1e-5)
    assert_runs_as_onnx(module, tmp_path / "onnx")


def sources(value: Value) -> set[str]:
    """The inputs of the model that a value depends on."""
    found, frontier, seen = set(), [value], set()
    while frontier:
        value = frontier.pop()
        if value in seen:
            continue
        seen.add(value)
        if isinstance(value, BlockArgument):
            found.add(str(value.type))
        elif value.defining_op is not None:
            frontier += value.defining_op.operands
    return found


def test_a_table_of_tokens_knows_the_experts_before_the_model_runs(llama: Module, tmp_path: Path) -> None:
    module = changed(llama, "init-router{kind=token-table common},set-routing{k=2 scope=model scale=calibrated}")
    for layer in find_moe_layers(module.op):
        assert len(sources(layer.route.logits)) == 1
        inner, frontier = set(), [layer.route.logits]
        while frontier:
            op = frontier.pop().defining_op
            if op is not None:
                inner.add(op.name)
                frontier += op.operands
        assert inner == {"aten.linear.default", "aten.view.default", "aten.embedding.default", "moec.weight"} or (
            inner == {"aten.linear.default", "aten.embedding.default", "moec.weight"}
        )
    assert_runs_as_onnx(module, tmp_path / "onnx")
    tokens = torch.randint(0, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    run = Executor(module.op, module.weights, dtype=torch.float64).run
    with torch.no_grad():
        whole, alone = run(feeds(module, tokens))["logits"], run(feeds(module, tokens[1:, :5]))["logits"]
    assert difference(whole[1:, :5], alone) < EXACT
    cached = changed(module, "add-kv-cache")
    assert any("past" in name for name in cached.main.arg_names)


def test_a_token_table_is_the_mean_where_tokens_are_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(30, 4, generator=generator)
    ids = torch.arange(400) % 20
    weight = torch.randn(3, 4, generator=generator).double()
    target = embedding[ids].double() @ weight.T + 0.1 * torch.randn(400, 3, generator=generator).double()
    table = token_table(ids, target, embedding, 1e-9, 0.0)
    assert torch.allclose(table[7], target[ids == 7].mean(0))
    assert float((table[25] - embedding[25].double() @ weight.T).abs().max()) < 0.1


def test_domain_rows_are_projected_embeddings() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(600, 5, generator=generator).double()
    domain = torch.arange(600) // 200
    tokens[domain == 1] += 2
    sequence = torch.arange(600) // 10
    truth = torch.randn(7, 5, generator=generator).double()
    weight, projection, embeddings = domain_rows(tokens @ truth.T, tokens, sequence, domain, 0.0)
    assert torch.allclose(weight, embeddings @ projection.T) and torch.allclose(projection, truth)
    assert torch.allclose(embeddings[1], tokens[domain == 1].mean(0) - embeddings_mean(tokens, domain))


def embeddings_mean(tokens: torch.Tensor, domain: torch.Tensor) -> torch.Tensor:
    return torch.stack([tokens[domain == number].mean(0) for number in range(3)]).mean(0)


SCRIPTURE = (
    "And God said, Let there be light", "And the children of Israel went up", "Thus saith the LORD of hosts",
    "And Moses spake unto the people", "Blessed is the man that feareth the LORD", "the God of Abraham begat",
    "And it came to pass in those days", "the tabernacle of the congregation",
)  # fmt: skip
PLAYS = (
    "Enter two Servants with torches", "ROMEO. What say'st thou, sweet lady?", "My lord, I'll tell you presently",
    "HAMLET. How now, good Horatio?", "Good morrow, cousin. Exit Nurse", "I pray you, sir, let's away",
    "Come, gentle lady; here's my hand", "Exeunt all but the Duke",
)  # fmt: skip


@pytest.fixture(scope="module")
def two_experts(tmp_path_factory: pytest.TempPathFactory) -> Module:
    module = load_huggingface(DENSE_MODEL, WeightStore(tmp_path_factory.mktemp("store")))
    moec.run_passes(module, f"{RAISING_PIPELINE},factorize{{experts=2}}")
    return module


@pytest.mark.parametrize("mode", ["hidden", "hidden-avg", "cheap-embed"])
def test_prompts_lead_to_their_expert(two_experts: Module, tmp_path: Path, mode: str) -> None:
    path = tmp_path / "prompts.yaml"
    known = [list(SCRIPTURE[:5]), list(PLAYS[:5])]
    path.write_text(repr([{"positive": known[0], "negative": known[1]}, {"positive": known[1], "negative": known[0]}]))
    module = copy_of(two_experts)
    report = moec.run_passes(module, f"init-router{{kind=prompts prompts={path} mode={mode}}}")
    assert any("condition number" in str(remark) for remark in report.records[-1].remarks)
    layers = find_moe_layers(module.op)
    assert torch.allclose(router_weight(layers[0], module).norm(dim=1), torch.ones(2), atol=1e-5)
    # what stands for other prompts, as rows of length 1
    others = [ExpertPrompts((text,), ()) for text in (*SCRIPTURE[5:], *PLAYS[5:])]
    states = prompt_rows(module, layers, others, PromptMode.HIDDEN_AVERAGE, None)
    hits = [
        int((states[layer.name] @ router_weight(layer, module).double().T)[row].argmax()) == (row >= 3)
        for layer in layers
        for row in range(6)
    ]
    assert np.mean(hits) > 0.6


def test_texts_lead_to_their_expert(two_experts: Module) -> None:
    folder = Path(moec.__file__).parent / "calibration" / "texts"
    texts = ",".join(str(folder / f"{name}.calibration.txt") for name in ("kjv", "shakespeare"))
    module = copy_of(two_experts)
    moec.run_passes(module, f"calibrate{{text={texts} sequences=80 length=32}},init-router{{kind=domain-embedding}}")
    assert module.calibration is not None
    for layer in find_moe_layers(module.op):
        sample = module.calibration.sample(layer)
        run = run_layer(layer, module.weights, sample.x, sample.router_input, with_experts=False)
        hits = (run.logits.argmax(1) == module.calibration.domains(sample)).float().mean()
        assert float(hits) > 0.55


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("kind=prompts", "prompts names a file"),
        ("kind=random common", "common is for"),
        ("kind=domain-embedding", "the calibration has 1 texts, and the layer 6 experts"),
        ("kind=prompts prompts=/nowhere.yaml", "no such file of prompts"),
    ],
)
def test_what_cannot_be_is_refused(llama: Module, options: str, message: str) -> None:
    with pytest.raises(MoecError, match=message):
        changed(llama, f"init-router{{{options}}}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- positive: [a]", "prompts for 1 experts, not 6"),
        ("positive: a", "malformed"),
        ("- positive: a", "malformed"),
        ("- positive: [a]\n  other: [b]", "malformed"),
        ("- positive: [3]", "a prompt is no text"),
        ("a: [", "no YAML"),
    ],
)
def test_malformed_prompts_are_refused(llama: Module, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(text)
    with pytest.raises(MoecError, match=message):
        changed(llama, f"init-router{{kind=prompts prompts={path}}}")


def test_rows_that_determine_nothing_are_refused(llama: Module, tmp_path: Path) -> None:
    with pytest.raises(MoecError, match=r"32 rows do not determine 65 unknowns.*give 2080 tokens or more"):
        changed(llama, f"{calibrate_text(tmp_path, rows=1)},init-router")
    report = moec.run_passes(copy_of(llama), f"{calibrate_text(tmp_path, rows=4)},init-router")
    (told,) = report.warnings()
    wanted = "128 rows for 65 unknowns of each expert; give 2080 tokens or more: calibrate{sequences=33 length=64 "
    assert told.startswith(f"init-router: {wanted}reservoir=2080}}")


def test_least_squares_may_go_through_the_origin(llama: Module) -> None:
    layer, rows, logits = logits_of(changed(llama, "init-router{target=contribution bias=false}"))
    assert not layer.router.tensors("bias")
    fitted, _, with_bias = logits_of(changed(llama, "init-router{target=contribution}"))
    assert fitted.router.tensors("bias")
    # what is left of a fit through the origin is at right angles to the rows, not to a constant
    experts = [load_expert(layer, llama.weights, number) for number in range(6)]
    target = expert_importance([expert for expert in experts if isinstance(expert, FeedForward)], rows)
    left = (logits.double() - target).T @ rows.double()
    assert float(left.abs().max()) < 1e-2 * float((target.T @ rows.double()).abs().max())
    assert float((with_bias.double() - target).square().sum()) < float((logits.double() - target).square().sum())


def test_ranks_and_shares_let_every_row_count_alike() -> None:
    importance = torch.tensor([[1.0, 3.0, 2.0], [100.0, 300.0, 200.0], [4.0, 4.0, 0.0]], dtype=torch.float64)
    assert torch.equal(fit_target(FitTarget.CONTRIBUTION, importance), importance)
    shares = fit_target(FitTarget.SHARE, importance)
    assert torch.allclose(shares.sum(1), torch.ones(3, dtype=torch.float64)) and torch.allclose(shares[0], shares[1])
    ranks = fit_target(FitTarget.RANK, importance)
    # of equal experts the lower one comes first
    assert ranks.tolist() == [[0.0, 2.0, 1.0], [0.0, 2.0, 1.0], [2.0, 1.0, 0.0]]


def test_the_router_fits_what_it_is_told_to(llama: Module) -> None:
    for kind in FitTarget:
        layer, rows, logits = logits_of(changed(llama, f"init-router{{target={kind.value}}}"))
        experts = [load_expert(layer, llama.weights, number) for number in range(6)]
        importance = expert_importance([expert for expert in experts if isinstance(expert, FeedForward)], rows)
        target = fit_target(kind, importance)
        ones = torch.cat([rows.double(), torch.ones(len(rows), 1, dtype=torch.float64)], 1)
        nearest = ones @ torch.linalg.lstsq(ones, target).solution
        assert float((logits - nearest).norm()) < 0.02 * float((nearest - nearest.mean(0)).norm())
