"""set-routing: which experts a token gets, with which gates, and who shares one choice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moec
from moec.dialects.moe import RouteOp, Routing, Score
from moec.errors import UsageError
from moec.experts import find_moe_layers, replace_router, replace_routing, run_layer
from moec.module import Module
from moec.reference.executor import Executor
from moec.reference.frame import Observation
from moec.reference.route import RouteInputs, route
from tests.codegen.running import assert_close, emit_and_run
from tests.experts.models import calibrate_text, copy_of, difference, output, raised_model

EXACT = 1e-9


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return raised_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llama(dense: Module, tmp_path_factory: pytest.TempPathFactory) -> Module:
    module = copy_of(dense)
    text = calibrate_text(tmp_path_factory.mktemp("tokens"), rows=80, length=32)
    moec.run_passes(module, f"factorize{{experts=6}},{text},init-router")
    return module


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Module:
    folder = tmp_path_factory.mktemp("bert")
    module = raised_model("bert", folder)
    moec.run_passes(module, "factorize{experts=4},init-router{kind=random deviation=1}")
    return module


def changed(source: Module, pipeline: str) -> Module:
    module = copy_of(source)
    moec.run_passes(module, pipeline)
    return module


def routing(source: Module, options: str) -> Routing:
    found: Routing = find_moe_layers(changed(source, f"set-routing{{{options}}}").op)[0].route.routing
    return found


def chosen(routing: Routing, probabilities: list[float]) -> int:
    """How many experts a token with these scores gets."""
    return int(route(RouteInputs(torch.tensor([probabilities], dtype=torch.float64).log()), routing)[2])


def test_entropy_selection_is_that_of_dynmole(llama: Module) -> None:
    """Its code keeps what stays within .75, two experts at least, and all where the entropy is above .9."""
    options = "select=entropy p=0.75 k_min=2 order=1.1 crossing=false combine=score"
    six = routing(llama, options)
    assert chosen(six, [1 - 5e-9, 1e-9, 1e-9, 1e-9, 1e-9, 1e-9]) == 2
    assert chosen(six, [1 / 6] * 6) == 6
    assert chosen(six, [0.3, 0.3, 0.1, 0.1, 0.1, 0.1]) == 6
    assert chosen(routing(llama, f"{options} unsure=1.0"), [0.3, 0.3, 0.1, 0.1, 0.1, 0.1]) == 3
    # MixLoRA, Dynamic MoE: the expert that crosses p is taken
    assert chosen(routing(llama, "select=top-p p=0.75"), [0.3, 0.3, 0.1, 0.1, 0.1, 0.1]) == 4
    assert chosen(routing(llama, "select=top-p p=0.75 k_max=2"), [0.3, 0.3, 0.1, 0.1, 0.1, 0.1]) == 2
    assert chosen(routing(llama, "select=threshold threshold=0.2"), [0.3, 0.3, 0.1, 0.1, 0.1, 0.1]) == 2


def test_entropy_selection_among_four(dense: Module) -> None:
    module = changed(dense, "factorize{experts=4},set-routing{select=entropy p=0.75 k_min=2 crossing=false}")
    four = find_moe_layers(module.op)[0].route.routing
    # normalised entropy .839; the first expert alone is within .75
    assert chosen(four, [0.5, 0.3, 0.1, 0.1]) == 2
    assert four.entropy_threshold == pytest.approx(0.9 * (1 - 4**-0.1) / 0.1)


def test_gates_of_every_rule(llama: Module) -> None:
    layer = find_moe_layers(changed(llama, "set-routing{k=3}").op)[0]
    assert llama.calibration is not None
    sample = llama.calibration.sample(layer)

    def gates(options: str) -> tuple[torch.Tensor, torch.Tensor]:
        found = find_moe_layers(changed(llama, f"set-routing{{k=3 {options}}}").op)[0]
        run = run_layer(found, sample.weights, sample.x, sample.router_input, torch.float64, with_experts=False)
        return run.gates, run.logits.softmax(1).gather(1, run.ids)

    ones, scores = gates("combine=one")
    assert bool((ones == 1).all())
    assert torch.equal(gates("combine=one-plus")[0], ones)
    assert torch.allclose(gates("combine=one-plus u=0.5")[0], 1 + 0.5 * scores, rtol=1e-12)
    assert torch.allclose(gates("combine=one-plus u=0.5 scale=constant factor=3")[0], 3 + 1.5 * scores, rtol=1e-12)
    assert torch.allclose(gates("combine=score")[0], scores, rtol=1e-12)
    shares = scores / scores.sum(1, keepdim=True)
    assert torch.allclose(gates("combine=score-share")[0], shares, rtol=1e-9)
    assert torch.allclose(gates("combine=softmax scale=constant factor=2")[0], 2 * shares, rtol=1e-9)
    back = changed(llama, "set-routing{k=3 combine=one-plus u=1 scale=constant factor=2},set-routing{combine=one}")
    assert find_moe_layers(back.op)[0].route.routing.scale == 2 and "offset" not in back.print()


def test_a_calibrated_scale_fits_gates_with_an_offset(llama: Module) -> None:
    plain = changed(llama, "set-routing{k=2 combine=one-plus u=0.5}")
    fitted = changed(llama, "set-routing{k=2 combine=one-plus u=0.5 scale=calibrated}")
    assert llama.calibration is not None

    def error(module: Module) -> float:
        total = 0.0
        for layer in find_moe_layers(module.op):
            sample = llama.calibration.sample(layer)  # type: ignore[union-attr]
            y = run_layer(layer, sample.weights, sample.x, sample.router_input).y
            assert y is not None
            total += float((y - sample.y).square().sum())
        return total

    assert error(fitted) < error(plain)
    for layer in find_moe_layers(fitted.op):
        assert layer.route.routing.scale == pytest.approx(0.5 * layer.route.routing.offset)


def test_a_share_of_the_experts(llama: Module) -> None:
    for share, k in ((0.5, 3), (0.01, 1), (0.75, 4), (1.0, 6)):
        assert find_moe_layers(changed(llama, f"set-routing{{share={share}}}").op)[0].top_k == k


def test_all_experts_then_fewer(llama: Module) -> None:
    every = changed(llama, "set-routing{select=all}")
    assert difference(output(llama), output(every)) < EXACT
    assert find_moe_layers(changed(every, "set-routing{k=2}").op)[0].top_k == 2


def test_layers_that_follow_the_first_choose_alike(llama: Module, tmp_path: Path) -> None:
    module = changed(llama, "set-routing{k=2 scope=model scale=calibrated}")
    layers = find_moe_layers(module.op)
    assert len(layers) > 1 and len({id(layer.router) for layer in layers}) == 1
    routes = [op for op in module.op.walk() if isinstance(op, RouteOp)]
    assert len({op.logits for op in routes}) == 1
    assert difference(output(llama), output(changed(llama, "set-routing{scope=model}"))) < EXACT
    again = changed(module, "set-routing{k=3}")
    assert [layer.top_k for layer in find_moe_layers(again.op)] == [3] * len(layers)
    tokens = torch.randint(0, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    feeds = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "position_ids": torch.arange(7)[None]}
    feeds["position_ids"] = feeds["position_ids"].expand(2, 7)
    feeds = {name: feeds[name] for name in module.main.arg_names}
    found, _ = emit_and_run(module, feeds, tmp_path / "onnx")
    with torch.no_grad():
        expected = Executor(module.op, module.weights).run(feeds)
    assert_close(found["logits"], expected["logits"].numpy(), 1e-4)


def test_logits_of_a_small_spread_are_nearly_equal_gates_and_choose_the_same(llama: Module) -> None:
    spread, equal = (
        changed(llama, f"set-routing{{k=2 {options} scale=calibrated}}")
        for options in ("combine=softmax spread=0.004", "combine=one")
    )
    for one, other in zip(find_moe_layers(spread.op), find_moe_layers(equal.op), strict=True):
        assert llama.calibration is not None
        sample = llama.calibration.sample(one)
        runs = [run_layer(layer, llama.weights, sample.x, sample.router_input) for layer in (one, other)]
        logits = runs[0].logits.double() / one.route.routing.temperature
        assert float((logits - logits.mean(1, keepdim=True)).std()) == pytest.approx(0.004, rel=1e-3)
        same = (runs[0].ids.sort(1).values == runs[1].ids.sort(1).values).all(1)
        assert float(same.double().mean()) > 0.999
        assert runs[0].y is not None and runs[1].y is not None
        assert difference(runs[1].y[same], runs[0].y[same]) < 0.02
    every = changed(llama, "set-routing{k=6 combine=softmax spread=0.004 scale=calibrated}")
    assert difference(output(llama), output(every)) < EXACT


def test_tokens_of_a_sequence_share_their_experts(bert: Module, tmp_path: Path) -> None:
    module = changed(bert, "set-routing{k=2 scope=sequence}")
    assert difference(output(bert), output(changed(bert, "set-routing{scope=sequence}"))) < EXACT
    seen: list[torch.Tensor] = []
    tokens = torch.randint(0, 90, (3, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[2, 5:] = 0
    names = module.main.arg_names
    feeds = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": torch.zeros_like(tokens)}
    feeds = {name: feeds[name] for name in names}
    executor = Executor(module.op, module.weights, dtype=torch.float64)

    def watch(observation: Observation) -> None:
        if isinstance(observation.op, RouteOp) and observation.results[0].numel() == 3 * 8 * 2:
            seen.append(observation.results[0].reshape(3, 8, 2))

    with torch.no_grad():
        together = executor.run(feeds, observers=[watch])
        alone = executor.run({name: value[2:, :5] for name, value in feeds.items()})
    assert all(bool((ids == ids[:, :1]).all()) for ids in seen)
    assert any(not bool((ids[0] == ids[1]).all()) for ids in seen)
    # another batch, no padding: the same
    first = next(iter(together))
    assert difference(alone[first], together[first][2:, :5]) < EXACT
    found, _ = emit_and_run(module, feeds, tmp_path / "onnx")
    assert_close(found[first], together[first].numpy(), 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("k=7", "7 experts cannot be chosen among 6"),
        ("select=top-p k_min=7", "7 experts cannot be chosen among 6.*smaller k_min"),
        ("k=2 scope=sequence", "a decoder chooses for its first token before it knows the others"),
        ("select=top-k", "top-k needs k"),
        ("k=2 share=0.5", "share is at most 1, and excludes k"),
        ("select=top-p k=2", "k has no meaning for top-p"),
        ("select=top-p p=1.5", "p must be above 0"),
        ("u=2", "u is for combine=one-plus"),
        ("k=2 spread=0.1", "spread is for combine=softmax"),
        ("select=entropy order=0", "order must be positive"),
    ],
)
def test_what_cannot_be_is_refused(llama: Module, options: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        changed(llama, f"set-routing{{{options}}}")


def test_scores_that_are_no_shares_have_no_top_p(llama: Module) -> None:
    module = copy_of(llama)
    layer = find_moe_layers(module.op)[0]
    replace_routing(layer, replace(layer.route.routing, score=Score.SIGMOID))
    with pytest.raises(UsageError, match="sigmoid"):
        moec.run_passes(module, "set-routing{select=top-p}")


def test_use_of_experts_is_told_and_those_that_nothing_chooses_are_named(llama: Module) -> None:
    module = copy_of(llama)
    layer = find_moe_layers(module.op)[0]
    weight = torch.zeros(layer.outputs, layer.hidden_size)
    replace_router(layer, module.weights, weight, torch.arange(layer.outputs, 0, -1).float())
    report = moec.run_passes(module, "set-routing{k=2}")
    record = report.records[-1]
    assert "0.0% to 50.0% of the choices" in str(record.remarks[0]) and "none chose 2, 3, 4, 5" in str(
        record.remarks[0]
    )
    assert record.statistics["unused"] >= 4
    # with all experts there is nothing that a token leaves out
    every = moec.run_passes(module, "set-routing{k=6}").records[-1]
    assert every.statistics.get("unused", 0) == 0 and "100.0% of the entropy" in str(every.remarks[0])
