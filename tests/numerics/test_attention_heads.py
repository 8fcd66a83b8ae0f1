"""factorize{target=attention-heads}: groups of heads as experts of the output projection."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import moec
from moec.artifact.tokens import function_inputs, token_batch
from moec.codegen.onnx.emit import MODEL_FILE, emit_onnx
from moec.codegen.onnx.targets import Target
from moec.errors import UsageError
from moec.experts import find_moe_layers, run_layer
from moec.experts.heads import find_attention, read_heads
from moec.module import Module
from moec.passes.factorize import Factorize
from moec.passes.factorize import Target as FactorizeTarget
from moec.passes.factorizing.activity import Observed
from moec.passes.factorizing.division import Partition
from moec.passes.factorizing.heads import divide_heads
from tests.experts.models import calibrate_text, copy_of, difference, output, raised_model

EXACT = 1e-9
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return raised_model("llama", tmp_path_factory.mktemp("llama"), **HEADS)


def changed(source: Module, pipeline: str) -> Module:
    module = copy_of(source)
    moec.run_passes(module, pipeline)
    return module


@pytest.mark.parametrize(
    "options", ["experts=2 partition=contiguous", "experts=4", "experts=2 partition=random", "experts=3 uneven=ragged"]
)
def test_all_heads_together_are_the_attention(llama: Module, options: str) -> None:
    module = changed(llama, f"factorize{{target=attention-heads {options}}}")
    layers = find_moe_layers(module.op)
    count = int(options[8])
    assert [(layer.expert_count, layer.top_k) for layer in layers] == [(count, count)] * len(find_attention(llama.op))
    assert difference(output(llama), output(module)) < EXACT


def test_biases_of_projections_are_added_once(tmp_path: Path) -> None:
    source = raised_model("gpt2", tmp_path)
    module = changed(source, "factorize{target=attention-heads experts=2}")
    assert len(find_moe_layers(module.op)) == len(find_attention(source.op)) > 0
    assert difference(output(source), output(module)) < EXACT


def test_an_expert_is_the_attention_with_its_heads_alone(llama: Module, tmp_path: Path) -> None:
    text = calibrate_text(tmp_path)
    module = changed(llama, f"factorize{{target=attention-heads experts=2 partition=contiguous}},{text}")
    layer = find_moe_layers(module.op)[0]
    assert module.calibration is not None
    sample = module.calibration.sample(layer)
    moec.run_passes(module, "init-router{kind=random},set-routing{k=1}")
    layer = find_moe_layers(module.op)[0]
    run = run_layer(layer, module.weights, sample.x, sample.router_input)
    assert run.y is not None and 0 < float(run.ids.double().mean()) < 1
    heads = read_heads(find_attention(llama.op)[0], 0)
    matrix = heads.load_units(llama.weights).transpose(0, 1).flatten(1)
    half = matrix.shape[1] // 2
    mask = (torch.arange(matrix.shape[1]) // half) == run.ids
    assert difference((sample.x * mask) @ matrix.T, run.y) < 1e-5


@pytest.mark.parametrize("target", list(Target))
def test_routed_heads_run_in_onnx(llama: Module, target: Target, tmp_path: Path) -> None:
    import onnxruntime

    module = changed(llama, "factorize{target=attention-heads experts=2},init-router{kind=random},set-routing{k=1}")
    emit_onnx(module, tmp_path, target=target)
    session = onnxruntime.InferenceSession(str(tmp_path / MODEL_FILE), providers=["CPUExecutionProvider"])
    batch = token_batch(module, rows=2, length=24)
    inputs = function_inputs(module.main, batch)
    given = {item.name: inputs[item.name].numpy() for item in session.get_inputs()}
    found = torch.from_numpy(np.asarray(session.run(None, given)[0]))
    real = torch.from_numpy(batch.mask).bool()
    assert difference(output(module, torch.float32)[real], found[real]) < 1e-4


def test_heads_that_cannot_be_cut_are_refused(llama: Module, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="5 experts do not divide 4 groups of heads"):
        changed(llama, "factorize{target=attention-heads experts=5 uneven=ragged}")
    wide = raised_model("llama", tmp_path, **{**HEADS, "head_dim": 16})
    report = moec.run_passes(wide, "factorize{target=attention-heads experts=2}")
    assert "its heads have 128 channels" in report.records[0].refusals[0].reason


def test_heads_are_grouped_by_what_they_do_on_text(llama: Module, tmp_path: Path) -> None:
    text = calibrate_text(tmp_path, rows=8, options="heads gradients=true")
    source = changed(llama, text)
    calibration = source.calibration
    assert calibration is not None
    heads = read_heads(find_attention(source.op)[0], 0)
    sample = calibration.sample(heads)
    # what is kept are the projection's rows, and the calibration serves the experts that heads become
    columns = heads.load_units(source.weights)
    given = sample.x.reshape(len(sample), heads.units, heads.unit_size)
    added = torch.einsum("nuc,uhc->nuh", given, columns)
    assert difference(sample.y, added.sum(1)) < 1e-5
    module = changed(source, "factorize{target=attention-heads experts=2 partition=co-activation active=1},init-router")
    assert difference(output(llama), output(module)) < EXACT
    layer = find_moe_layers(module.op)[0]
    run = run_layer(layer, module.weights, sample.x, sample.router_input)
    assert run.y is not None and difference(sample.y, run.y) < 1e-5
    for partition in ("co-activation-graph", "gradient"):
        other = changed(source, f"factorize{{target=attention-heads experts=2 partition={partition}}}")
        assert difference(output(llama), output(other)) < EXACT
    plain = changed(llama, calibrate_text(tmp_path, rows=2))
    with pytest.raises(UsageError, match=r"no rows of attention.*calibrate\{heads=true\}"):
        changed(plain, "factorize{target=attention-heads experts=2 partition=co-activation}")


def test_co_activation_joins_heads_that_write_to_the_same_tokens(llama: Module) -> None:
    heads = read_heads(find_attention(llama.op)[0], 0)
    columns = heads.load_units(llama.weights)
    x = torch.randn(200, heads.units, heads.unit_size, generator=torch.Generator().manual_seed(0)) * 1e-2
    x[:100, [0, 3]] *= 1e3
    x[100:, [1, 2]] *= 1e3
    x /= columns.flatten(1).norm(dim=1)[None, :, None]
    observed = Observed(x.flatten(1), None, torch.zeros(200, dtype=torch.int64), torch.zeros(200, dtype=torch.int64))
    division = Factorize(
        experts=2, target=FactorizeTarget.ATTENTION_HEADS, partition=Partition.CO_ACTIVATION
    )._division()
    groups = divide_heads(division, heads, llama.weights, [2, 2], lambda: observed, torch.Generator())
    assert sorted(group.tolist() for group in groups) == [[0, 3], [1, 2]]
