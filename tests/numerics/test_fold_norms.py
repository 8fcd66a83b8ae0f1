"""fold-norms: the same function without norm weights, with RMS norms, with one channel less."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import moec
from moec.artifact.options import RAISING_PIPELINE, Check
from moec.artifact.recorder import LedgerRecorder
from moec.artifact.tokens import function_inputs, token_batch
from moec.codegen.onnx.targets import parse_target
from moec.dialects.nn import LayerNormOp, RMSNormOp
from moec.errors import UnsupportedModelError
from moec.experts import find_moe_layers
from moec.frontend.huggingface import load_huggingface
from moec.ir import structural_difference
from moec.module import Module
from moec.pipeline.manager import PassManager, Pipeline
from moec.reference.executor import Executor
from moec.weights.store import WeightStore
from tests.codegen.running import emit_and_run
from tests.experts.models import copy_of, difference, output, raised_model
from tests.frontend.architectures import small_model

EXACT = 1e-9


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Module:
    """Pre-norm, biases everywhere, learned positions, a tied head; an epsilon of its own."""
    return raised_model("gpt2", tmp_path_factory.mktemp("gpt2"), layer_norm_epsilon=3e-4)


def folded(source: Module, options: str) -> Module:
    """After the pass, which the ledger held to its claim."""
    module = copy_of(source)
    recorder = LedgerRecorder(module, Check.CHANGED)
    PassManager(Pipeline.parse(options), observers=[recorder]).run(module.op, weights=module.weights, module=module)
    assert all(entry.outcome.value in ("within bound", "unchanged") for entry in recorder.entries)
    return module


def norms(module: Module) -> list[RMSNormOp | LayerNormOp]:
    return [op for op in module.op.walk() if isinstance(op, RMSNormOp | LayerNormOp)]


def weight(module: Module, name: str) -> torch.Tensor:
    source = next(op.source for op in module.op.walk() if op.attributes.get("weight_name") == name)  # type: ignore[attr-defined]
    return module.weights.load(module.weights.unrounded(source)).double()


@pytest.mark.parametrize("to", ["affine", "rms", "crms"])
def test_a_pre_norm_model_computes_the_same_without_norm_weights(gpt2: Module, to: str) -> None:
    module = folded(gpt2, f"fold-norms{{to={to}}}")
    before, after = output(gpt2), output(module)
    assert difference(before, after) < EXACT
    assert torch.equal(before.argmax(-1), after.argmax(-1))
    found = norms(module)
    assert len(found) == 5 and all(norm.operand_count == 1 and norm.epsilon == 3e-4 for norm in found)
    assert all(isinstance(norm, LayerNormOp if to == "affine" else RMSNormOp) for norm in found)
    assert {norm.x.type.shape[-1] for norm in found} == {63 if to == "crms" else 64}  # type: ignore[union-attr]
    again = folded(module, f"fold-norms{{to={to}}}")
    assert structural_difference(module.op, again.op) is None


def test_every_writer_to_the_stream_gives_vectors_of_mean_zero(gpt2: Module) -> None:
    module = folded(gpt2, "fold-norms")
    for name in ("transformer.wte.weight", "transformer.wpe.weight"):
        assert float(weight(module, name).mean(1).abs().max()) < 1e-12
    for layer in range(2):
        for part in ("attn", "mlp"):
            matrix = weight(module, f"transformer.h.{layer}.{part}.c_proj.weight")
            bias = weight(module, f"transformer.h.{layer}.{part}.c_proj.bias")
            assert matrix.shape == (64, 64 if part == "attn" else 256)
            assert float(matrix.mean(0).abs().max()) < 1e-12 and abs(float(bias.mean())) < 1e-12
    # the head is no longer the embedding
    assert weight(module, "transformer.wte.weight#2").shape == (96, 64)


def test_weights_that_are_read_twice_stay_tied_on_request(gpt2: Module) -> None:
    module = folded(gpt2, "fold-norms{to=affine untie=false}")
    assert [norm.operand_count for norm in norms(module)] == [1, 1, 1, 1, 3]
    with pytest.raises(UnsupportedModelError, match=r"wte\.weight writes, which other operations read, too"):
        folded(gpt2, "fold-norms{untie=false}")


def test_a_channel_can_be_left_out_later(gpt2: Module) -> None:
    module = folded(gpt2, "fold-norms{to=affine},fold-norms,fold-norms{to=crms}")
    assert difference(output(gpt2), output(module)) < EXACT
    assert all(isinstance(norm, RMSNormOp) and norm.zero_sum for norm in norms(module))


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_both_onnx_targets_compute_the_same(gpt2: Module, target: str, tmp_path: Path) -> None:
    feeds = function_inputs(gpt2.main, token_batch(gpt2, rows=2, length=24))
    expected = output(gpt2).numpy()
    for to in ("rms", "crms"):
        module = folded(gpt2, f"fold-norms{{to={to}}}")
        got, _ = emit_and_run(module, feeds, tmp_path / to, target=parse_target(target))
        real = feeds["attention_mask"].bool().numpy()
        found = got["logits"]
        assert np.abs(found - expected)[real].max() < 1e-5 * np.abs(expected).max()
        assert (found.argmax(-1) == expected.argmax(-1))[real].all()


@pytest.mark.parametrize("to", ["rms", "crms"])
def test_experts_read_and_write_the_stream_too(gpt2: Module, to: str) -> None:
    module = folded(gpt2, f"factorize{{experts=4 shared=16}},fold-norms{{to={to}}}")
    assert difference(output(gpt2), output(module)) < EXACT
    assert find_moe_layers(module.op)[0].hidden_size == (63 if to == "crms" else 64)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["phimoe", "mixtral", "llama", "gemma2"])
def test_routers_read_bare_norms(model: str, tmp_path: Path) -> None:
    source = raised_model(model, tmp_path)
    assert difference(output(source), output(folded(source, "fold-norms"))) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("model", ["opt", "gpt_neox", "cohere2", "stablelm", "falcon", "starcoder2", "nemotron"])
def test_pre_norm_architectures(model: str, tmp_path: Path) -> None:
    small_model(model).save_pretrained(tmp_path)
    source = load_huggingface(tmp_path, WeightStore(tmp_path / "store"))
    moec.run_passes(source, RAISING_PIPELINE)
    module = folded(source, "fold-norms{to=crms}")
    assert difference(output(source), output(module)) < EXACT
    assert all(isinstance(norm, RMSNormOp) and norm.zero_sum for norm in norms(module))


class RepBN(nn.Module):
    """BN(x) + alpha x over channels in the middle (SLAB, github.com/xinghaochen/SLAB)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha, self.norm = nn.Parameter(torch.ones(1)), nn.BatchNorm1d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2)
        return (self.norm(x) + self.alpha * x).transpose(1, 2)


class Unified(nn.Module):
    """Running quadratic mean, no centre (Unified Normalization)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean_square", torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / torch.sqrt(self.mean_square + 1e-5) + self.bias


class Flat(nn.Module):
    """Batch norm of tokens."""

    def __init__(self, channels: int, statistics: bool = True) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, track_running_stats=statistics)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, channels = x.shape
        return self.norm(x.reshape(batch * length, channels)).reshape(batch, length, channels)


class Scaled(nn.Module):
    """LayerNorm Scaling: LN(x) / sqrt(layer)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) / math.sqrt(3)


class Network(nn.Module):
    """One block with a layer scale, and a head of linear, norm and ReLU."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Linear(16, 16, bias=False)
        self.first, self.up, self.down = norm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.scale = nn.Parameter(torch.ones(16))
        self.second, self.head, self.third = norm(16), nn.Linear(16, 8), norm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        x = x + self.scale * self.down(nn.functional.gelu(self.up(self.first(x))))
        return torch.relu(self.third(self.head(self.second(x))))


def traced(norm: Callable[[int], nn.Module], folder: Path) -> tuple[nn.Module, Module]:
    network = Network(norm).eval()
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.3)
    module = moec.load(network, (torch.randn(2, 5, 16),), dynamic={"x": {0: "batch", 1: "seq"}})
    module.weights.store = WeightStore(folder / "store")
    moec.run_passes(module, "canonicalize,cse,dce,raise-nn,canonicalize,cse,dce")
    return network.double(), module


@pytest.mark.parametrize(("norm", "left"), [(RepBN, 0), (Unified, 0), (Flat, 0), (Scaled, 3)])
def test_norms_of_running_statistics_and_scales_go_into_linear_maps(
    norm: type[nn.Module], left: int, tmp_path: Path
) -> None:
    network, module = traced(norm, tmp_path)
    report = moec.run_passes(module, "fold-norms{to=affine}")
    # the third norm stands before a ReLU, and the scale before a sum: they go into the maps in front of them
    backward = 2 if left == 0 else 1
    assert report.records[0].statistics["backward"] == backward
    names = [op.name for op in module.op.walk()]
    assert (
        not {"aten.mul.Tensor", "aten.div.Tensor", "aten._native_batch_norm_legit_no_training.default"} & {*names}
        or left
    )
    assert len(norms(module)) == left
    x = torch.randn(3, 4, 16, dtype=torch.float64)
    expected = network(x).detach()
    with torch.no_grad():
        found = Executor(module.op, module.weights, dtype=torch.float64).run({"x": x})["output"]
    assert difference(expected, found) < EXACT
    if left == 0:
        got, _ = emit_and_run(module, {"x": x.float()}, tmp_path / "onnx")
        assert np.abs(got["output"] - expected.numpy()).max() < 1e-5 * float(expected.abs().max())


def test_norms_without_statistics_and_arguments_that_cannot_be_centred_are_refused(tmp_path: Path) -> None:
    _, module = traced(lambda channels: Flat(channels, statistics=False), tmp_path)
    report = moec.run_passes(module, "fold-norms")
    reasons = [refusal.reason for refusal in report.records[0].refusals]
    assert sum("there are no running statistics" in reason for reason in reasons) == 3
    network = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)).eval()
    module = moec.load(network, (torch.randn(2, 16),))
    module.weights.store = WeightStore(tmp_path / "store")
    moec.run_passes(module, "canonicalize,raise-nn,dce")
    with pytest.raises(UnsupportedModelError, match="takes the residual stream as an argument"):
        moec.run_passes(module, "fold-norms")


def test_a_stream_that_is_not_centred_keeps_its_channels(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(8, 16), nn.RMSNorm(16), nn.Linear(16, 8)).eval()
    module = moec.load(network, (torch.randn(2, 8),))
    module.weights.store = WeightStore(tmp_path / "store")
    moec.run_passes(module, "canonicalize,raise-nn,dce")
    with pytest.raises(UnsupportedModelError, match=r"aten\.linear\.default at 0 does not write vectors of mean zero"):
        moec.run_passes(module, "fold-norms{to=crms}")


def test_post_norm_models_are_refused_by_the_name_of_the_operation(tmp_path: Path) -> None:
    module = raised_model("bert", tmp_path)
    message = r"none of its norms can be folded: aten\.add\.Tensor at encoder\.layer\.0\.attention\.output"
    with pytest.raises(UnsupportedModelError, match=message):
        moec.run_passes(module, "fold-norms")
