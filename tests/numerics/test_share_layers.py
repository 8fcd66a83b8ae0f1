"""share-layers: the model of shared weights is the one whose layers hold equal tensors, and its file is smaller."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moec
from moec.artifact.options import RAISING_PIPELINE
from moec.codegen.onnx.emit import emit_onnx
from moec.codegen.onnx.targets import parse_target
from moec.dialects.builtin import WeightOp
from moec.experts import find_moe_layers
from moec.frontend.huggingface import load_huggingface
from moec.module import Module
from moec.weights.store import WeightStore
from tests.experts.models import copy_of, difference, output
from tests.frontend.tiny_models import save_tiny_checkpoint

LAYERS = 4
PAGE = 4096


def raised(folder: Path) -> Module:
    module = load_huggingface(folder, WeightStore(folder / "store"))
    moec.run_passes(module, RAISING_PIPELINE)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def model(folder: Path) -> Module:
    return raised(folder)


def changed(source: Module, pipeline: str) -> Module:
    module = copy_of(source)
    moec.run_passes(module, pipeline)
    return module


@pytest.mark.parametrize("options", ["group=2", "group=2 taken=average", "group=3"])
def test_it_is_the_model_with_equal_tensors(folder: Path, model: Module, tmp_path: Path, options: str) -> None:
    """The same function as a checkpoint in which the layers of a group hold one tensor each, norms apart."""
    size = int(options[6])
    tensors = load_file(folder / "model.safetensors")
    equal = dict(tensors)
    for name in tensors:
        if not name.startswith("model.layers.") or "norm" in name:
            continue
        number = int(name.split(".")[2])
        first = number - number % size
        group = [
            tensors[name.replace(f".{number}.", f".{other}.", 1)] for other in range(first, min(first + size, LAYERS))
        ]
        equal[name] = torch.stack(group).sum(0) / len(group) if "average" in options else group[0]
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({name: tensor.clone() for name, tensor in equal.items()}, plain / "model.safetensors")
    shared = changed(model, f"share-layers{{{options}}}")
    assert difference(output(raised(plain)), output(shared)) < (1e-6 if "average" in options else 1e-12)
    assert difference(output(model), output(shared)) > 1e-3


def file_bytes(module: Module, folder: Path) -> int:
    emit_onnx(module, folder, target=parse_target("portable"))
    return sum(path.stat().st_size for path in folder.glob("*.data"))


def test_what_is_shared_is_stored_once(folder: Path, model: Module, tmp_path: Path) -> None:
    shared = changed(model, "share-layers")
    sizes = {name: tensor.numel() * 4 for name, tensor in load_file(folder / "model.safetensors").items()}
    gone = [
        size
        for name, size in sizes.items()
        if name.startswith("model.layers.") and "norm" not in name and int(name.split(".")[2]) > 0
    ]
    before, after = file_bytes(model, tmp_path / "before"), file_bytes(shared, tmp_path / "after")
    # a tensor in a file may start at a whole page
    assert 0 <= before - after - sum(gone) <= PAGE * len(gone)
    names = [op.weight_name for op in shared.op.walk() if isinstance(op, WeightOp) and "norm" in op.weight_name]
    sources = {op.source for op in shared.op.walk() if isinstance(op, WeightOp) and "norm" in op.weight_name}
    assert len(names) == len(sources) == 2 * LAYERS + 1


def test_experts_and_routers_are_shared_too_and_routers_only_if_asked(model: Module) -> None:
    for keep, routers in (("norms", 1), ("norms-and-routers", LAYERS)):
        module = changed(model, f"upcycle{{experts=2}},share-layers{{keep={keep}}}")
        found = set()
        for layer in find_moe_layers(module.op):
            weight = layer.router.tensor("weight").defining_op
            assert isinstance(weight, WeightOp)
            found.add(weight.source)
        assert len(found) == routers
        assert len({str(layer.experts.weights[0].defining_op.source) for layer in find_moe_layers(module.op)}) == 1


def test_a_second_run_changes_nothing(model: Module) -> None:
    once = changed(model, "share-layers{group=2}")
    text = once.print()
    report = moec.run_passes(once, "share-layers{group=2}")
    assert once.print() == text and report.records[0].statistics["shared"] == 0
