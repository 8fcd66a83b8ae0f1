"""The source of generated kernels: as recorded, free of a model's names, clean, and refused where there is no form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moec.codegen.triton.ahead import Package
from moec.codegen.triton.emit import emit_triton
from moec.codegen.triton.reading import read_layer
from moec.codegen.triton.rendering import PACKAGE_NAME, render_package
from moec.codegen.triton.running import LayerRows, Place, run_layers
from moec.codegen.triton.spec import Element
from moec.dialects.builtin import ModuleOp
from moec.dialects.moe import ExpertsOp, Routing, Score, Select
from moec.dialects.nn import MLPOp
from moec.dialects.quant import Integer, Ternary
from moec.errors import UnsupportedModelError, UsageError
from moec.experts import find_moe_layers
from moec.ir import Location
from moec.module import Module
from moec.quantization.rounding import Target
from tests.codegen.running import module_of
from tests.codegen.triton_layers import HIDDEN, Case, build
from tests.ir.expert_bodies import constant, dense, latent, low_rank, mixed_layer

GOLDEN = Path(__file__).parent / "golden"
UPDATE = "MOEC_UPDATE_GOLDEN"

FORMS = Case(
    "forms",
    [(latent(HIDDEN, 16, 8), (0,)), (low_rank(HIDDEN, 24, 3, base=True), (1,)), (constant(HIDDEN), (2,))],
    (0, 1, 2, 1),
    shared=[(dense(HIDDEN, 24), True)],
    features=4,
)
RECORDED = {
    "forms.py": (Element.FLOAT16, FORMS),
    "equal.py": (Element.BFLOAT16, Case("equal")),
    "ragged_with_biases.py": (
        Element.FLOAT32,
        Case(
            "ragged",
            [(dense(HIDDEN, 40, bias=True), (0, 3)), (dense(HIDDEN, 5, bias=True, name="narrow"), (1, 2))],
            (0, 1, 1, 2, -1, 3),
            Routing(score=Score.SIGMOID, groups=3, topk_groups=2, k=2, scale=2.5, null_experts=1, skip_ratio=0.1),
            {"select_bias": torch.zeros(6), "mask": torch.ones(6)},
        ),
    ),
    "mixed_bits.py": (
        Element.BFLOAT16,
        Case(
            "mixed",
            [(dense(HIDDEN, 40), (0, 1, 2))],
            (0, 1, 2),
            packed={0: Target(Integer(4)), 1: Target(Ternary())},
        ),
    ),
}


def _source(element: Element, case: Case, store: Path) -> dict[str, str]:
    module = build([case], store=store)
    layer = read_layer(find_moe_layers(module.op)[0], module.weights, element)
    return render_package([layer.kind])


@pytest.mark.parametrize("name", list(RECORDED))
def test_source_is_as_recorded(name: str, tmp_path: Path) -> None:
    """A change of a template shows as a difference of these files; MOEC_UPDATE_GOLDEN=1 writes them anew."""
    text = _source(*RECORDED[name], tmp_path)["kind_0.py"]
    path = GOLDEN / name
    if os.environ.get(UPDATE):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list(RECORDED))
def test_source_is_clean(name: str, tmp_path: Path) -> None:
    for file, text in _source(*RECORDED[name], tmp_path / "store").items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    settings = Path(__file__).parents[2] / "pyproject.toml"
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, "--no-cache", "--config", str(settings), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_names_of_a_model_stay_out_of_source(tmp_path: Path) -> None:
    module = build([Case("shared", shared=[(dense(HIDDEN, 16), False)])])
    wild = ['layers.0"""\n{{ 7 * 7 }}\nimport os  # \\', "../../shared'''\n{% raise %}import os  #"]
    for op in module.op.walk():
        if isinstance(op, ExpertsOp | MLPOp):
            op.location = Location(name=wild[isinstance(op, MLPOp)])
    emit_triton(module, tmp_path, element=Element.FLOAT32)
    package = tmp_path / PACKAGE_NAME
    plain = render_package([read_layer(find_moe_layers(module.op)[0], module.weights, Element.FLOAT32).kind])
    assert {path.name: path.read_text(encoding="utf-8") for path in package.glob("*.py")} == plain
    for text in plain.values():
        assert "import os  #" not in text and "layers.0" not in text and "../" not in text
    written = json.loads((package / "layers.json").read_text(encoding="utf-8"))["layers"][0]
    assert [written["name"], *written["shared"]] == wild
    assert sorted(path.name for path in tmp_path.iterdir()) == [PACKAGE_NAME]


def test_triton_is_needed_where_kernels_run_or_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    emit_triton(build([Case("equal")]), tmp_path, element=Element.FLOAT32)
    package = tmp_path / PACKAGE_NAME
    with pytest.raises(UsageError, match="triton is not installed, and running its kernels needs it"):
        run_layers([LayerRows(package, 0, torch.zeros(1, HIDDEN))], Place.INTERPRETER)
    with pytest.raises(UsageError, match="triton is not installed, and compiling its kernels needs it"):
        Package.open(package)


def test_refuses_a_model_without_experts(tmp_path: Path) -> None:
    layer = mixed_layer([(dense(HIDDEN, 16), (0, 1))], (0, 1), hidden=HIDDEN)
    with pytest.raises(UnsupportedModelError, match="chosen by arithmetic"):
        emit_triton(module_of(layer.op, layer.weights), tmp_path, element=Element.FLOAT32)
    with pytest.raises(UnsupportedModelError, match="no layer with experts"):
        emit_triton(_without_experts(), tmp_path, element=Element.FLOAT32)


def _without_experts() -> Module:
    module = build([])
    assert isinstance(module.op, ModuleOp)
    return module


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        emit_triton(
            build([Case("equal"), Case("again"), Case("all", routing=Routing(select=Select.ALL))]),
            folder,
            element=Element.FLOAT16,
        )
    files = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*") if path.is_file())
    assert len([file for file in files if file.name.startswith("kind_")]) == 2
    for file in files:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file
