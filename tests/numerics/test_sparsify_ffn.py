"""sparsify-ffn: exact numbers of neurons, shares by thresholds, the formula of Gemma3n, predictors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import moec
from moec.artifact.tokens import function_inputs, token_batch
from moec.codegen.onnx.emit import MODEL_FILE, emit_onnx
from moec.codegen.onnx.targets import parse_target
from moec.dialects.aten import AtenOp
from moec.dialects.nn import MLPOp
from moec.errors import UsageError
from moec.experts import FeedForward, find_dense_layers, load_dense
from moec.ir import structural_difference
from moec.module import Module
from moec.passes.sparsification.neuron_choice import fit_predictor, neuron_scores, standard_scores
from moec.reference.executor import Executor
from moec.reference.frame import Observation
from tests.codegen.running import load, run
from tests.experts.models import calibrate_text, copy_of, difference, output, raised_model


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Module:
    """A calibrated dense model, with a gate and without."""
    module = raised_model(request.param, tmp_path_factory.mktemp(request.param))
    moec.run_passes(module, calibrate_text(tmp_path_factory.mktemp("tokens"), rows=24))
    return module


def changed(source: Module, pipeline: str) -> Module:
    module = copy_of(source)
    moec.run_passes(module, pipeline)
    return module


def first_block(module: Module) -> tuple[FeedForward, torch.Tensor]:
    """The first dense block of the source and its calibration rows."""
    layer = find_dense_layers(module.op)[0]
    assert module.calibration is not None
    return load_dense(layer, module.weights), module.calibration.sample(layer).x


def block_output(module: Module, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, hidden activations that the last matrix reads) of the first block of a model on rows [n, H]."""
    from moec.experts.expert import kernel_frame
    from moec.reference.plan import plan_block

    op = next(op for op in module.op.walk() if isinstance(op, MLPOp))
    block = op.regions[0].block
    frame = kernel_frame(torch.float32, {"tokens": len(rows)})
    frame.values[block.arguments[0]] = rows
    for argument, value in zip(block.arguments[1:], op.weights, strict=True):
        frame.values[argument] = module.weights.load(value.defining_op.attributes["source"]).float()  # type: ignore[union-attr]
    hidden: list[torch.Tensor] = []
    last = block.terminator.operands[0].defining_op

    def observe(seen: Observation) -> None:
        if seen.op is last:
            hidden.append(seen.operand(last.operands[0]))

    frame.settings.observers = (observe,)
    (y,) = plan_block(block).run(frame)
    return y, hidden[0]


def test_top_k_uses_exactly_the_best_neurons(dense: Module) -> None:
    block, rows = first_block(dense)
    y, hidden = block_output(changed(dense, "sparsify-ffn{keep=0.25}"), rows)
    count = round(0.25 * block.width)
    assert ((hidden != 0).sum(1) == count).all()
    chosen = neuron_scores(block, rows).topk(count, dim=1).indices
    mask = torch.zeros(len(rows), block.width).scatter(1, chosen, 1.0)
    assert difference(block.down.apply(block.hidden_activations(rows) * mask), y) < 1e-5
    worse, _ = block_output(changed(dense, "sparsify-ffn{keep=0.1}"), rows)
    exact = block.apply(rows)
    assert (y - exact).norm() < (worse - exact).norm()


@pytest.mark.parametrize("keep", [0.08, 0.5])
def test_thresholds_meet_the_share_of_neurons(dense: Module, keep: float) -> None:
    block, rows = first_block(dense)
    y, hidden = block_output(changed(dense, f"sparsify-ffn{{kind=statistical keep={keep}}}"), rows)
    assert abs(float((hidden != 0).double().mean()) - keep) < 0.02
    scores = standard_scores(block, rows)
    z = float(scores.flatten().sort().values[round((1 - keep) * scores.numel())])
    expected = block.down.apply(block.hidden_activations(rows) * (scores > z))
    close = (scores - z).abs().min(1).values > 1e-5
    assert difference(expected[close], y[close]) < 1e-5


def test_the_soft_form_is_that_of_gemma3n(dense: Module) -> None:
    from transformers.models.gemma3n.configuration_gemma3n import Gemma3nTextConfig
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

    block, rows = first_block(dense)
    y, _ = block_output(changed(dense, "sparsify-ffn{kind=soft keep=0.05 threshold=gaussian}"), rows)
    given = (block.up if block.gate is None else block.gate).apply(rows)
    config = Gemma3nTextConfig(
        hidden_size=64, intermediate_size=[block.width], num_hidden_layers=1, activation_sparsity_pattern=[0.95]
    )
    lowered = Gemma3nTextMLP(config, layer_idx=0)._gaussian_topk(given)
    up = lowered if block.gate is None else block.up.apply(rows)
    hidden = block.activation.compute(None if block.gate is None else lowered, up)
    assert difference(block.down.apply(hidden), y) < 1e-5


def test_all_neurons_are_the_dense_model_and_a_second_run_changes_nothing(dense: Module) -> None:
    assert structural_difference(changed(dense, "sparsify-ffn{keep=1}").op, dense.op) is None
    nearly = changed(dense, "sparsify-ffn{keep=0.9999}")
    assert any(isinstance(op, AtenOp) and op.name == "aten.topk.default" for op in nearly.op.walk())
    assert difference(output(dense), output(nearly)) < 1e-9
    again = changed(nearly, "sparsify-ffn{keep=0.25}")
    assert structural_difference(nearly.op, again.op) is None


def test_a_predictor_ranks_better_the_larger_its_rank(dense: Module) -> None:
    block, rows = first_block(dense)
    exact = block.apply(rows)
    errors = []
    for rank in (1, 8, 64):
        y, hidden = block_output(changed(dense, f"sparsify-ffn{{keep=0.25 predictor-rank={rank}}}"), rows)
        assert ((hidden != 0).sum(1) <= round(0.25 * block.width)).all()
        errors.append(float((y - exact).norm()))
    best, _ = block_output(changed(dense, "sparsify-ffn{keep=0.25}"), rows)
    assert errors[0] > errors[1] > errors[2] > float((best - exact).norm())
    scores = neuron_scores(block, rows)
    whole = fit_predictor(rows, scores, 64, 1e-4)
    assert float((whole.scores(rows) - scores).mean().abs()) < 1e-9


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_both_onnx_targets_mask_the_same_neurons(dense: Module, target: str, tmp_path: Path) -> None:
    feeds = function_inputs(dense.main, token_batch(dense, rows=2, length=24))
    for options in ("keep=0.25", "kind=soft keep=0.5"):
        compare(changed(dense, f"sparsify-ffn{{{options}}}"), feeds, tmp_path / options.replace(" ", "-"), target)


@pytest.mark.parametrize("options", ["keep=0.1", "keep=0.1 predictor-rank=8", "kind=statistical keep=0.1"])
def test_one_token_reads_the_weights_of_its_neurons_alone(dense: Module, options: str, tmp_path: Path) -> None:
    """The rows that are taken are those that the reference executor does not mask, whatever the token."""
    module = changed(dense, f"sparsify-ffn{{{options}}}")
    feeds = function_inputs(module.main, token_batch(module, rows=2, length=24))
    session = compare(module, feeds, tmp_path / "onnx", "portable")
    graph = onnx.load(tmp_path / "onnx" / MODEL_FILE, load_external_data=False).graph
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    branches = [node.attribute[0].g for node in graph.node if node.op_type == "If"]
    assert len(branches) == len(find_dense_layers(dense.op))
    gated = first_block(dense)[0].gate is not None
    # those that the choice does not read whole
    taken = 2 + gated if "predictor" in options else 1 + gated if "statistical" in options else 1
    for branch in branches:
        assert branch.name == "then_branch"
        assert sum(node.op_type == "Gather" and node.input[0] in matrices for node in branch.node) == taken
    executor = Executor(module.op, module.weights)
    for place in range(8):
        one = {name: value[:1, place : place + 1] for name, value in feeds.items()}
        with torch.no_grad():
            expected = executor.run(one)["logits"].numpy()
        (found,) = session.run(["logits"], {name: value.numpy() for name, value in one.items()})
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def compare(module: Module, feeds: dict[str, torch.Tensor], folder: Path, target: str) -> onnxruntime.InferenceSession:
    emit_onnx(module, folder, target=parse_target(target))
    session = load(folder)
    got = run(session, feeds)["logits"]
    with torch.no_grad():
        expected = Executor(module.op, module.weights).run(feeds)["logits"].numpy()
    real = feeds["attention_mask"].bool().numpy()
    assert np.abs(got - expected)[real].max() < 1e-4 * np.abs(expected).max()
    return session


def test_what_cannot_be_is_refused(dense: Module) -> None:
    with pytest.raises(UsageError, match="a predictor of rank 65 is larger than 64"):
        changed(dense, "sparsify-ffn{keep=0.5 predictor-rank=65}")
    uncalibrated = copy_of(dense)
    uncalibrated.calibration = None
    with pytest.raises(UsageError, match="was not calibrated"):
        changed(uncalibrated, "sparsify-ffn{keep=0.5 kind=statistical}")
