"""Experts in a file of their own: where they lie, and how much of them a run that uses few of them keeps in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch

import moec
from moec.artifact.manifest import read_manifest
from moec.artifact.opened import ONNX_FOLDER
from moec.artifact.options import Activations
from moec.artifact.runtime import OnnxModel
from moec.codegen.onnx.cost_model import Lowering
from moec.codegen.onnx.emit import EXPERTS_FILE, MODEL_FILE, OnnxReport, emit_onnx
from moec.codegen.onnx.session_file import read_session_file
from moec.codegen.onnx.targets import Target
from moec.dialects.builtin import PAGE_ATTRIBUTE, PREPACKED_ATTRIBUTE
from moec.dialects.moe import Normalize, Routing
from moec.dialects.quant import Integer, Span
from moec.module import Module
from tests.benchmarks.expert_layers import LayerShape, moe_layers
from tests.codegen.packed_matrices import expert, experts_module
from tests.codegen.running import assert_close, emit_and_run, module_of, reference
from tests.frontend.tiny_models import save_tiny_checkpoint

FORMAT = Integer(4, Span.GROUP, 32)
PAGE = 4096


def _packed_layer(experts: int, hidden: int, width: int, top_k: int) -> Module:
    generator = torch.Generator().manual_seed(0)
    members = [expert([FORMAT] * 3, hidden, width, generator)] * experts
    routing = Routing(k=top_k, normalize=Normalize.SUM)
    return module_of(*experts_module([members], hidden, routing=routing))


@pytest.mark.parametrize("packed", [False, True], ids=["float32", "4 bits"])
def test_an_expert_lies_together_on_pages_of_its_own(packed: bool, tmp_path: Path) -> None:
    module = _packed_layer(4, 64, 64, 2) if packed else moe_layers(LayerShape(4, 64, 96, 2))
    module.op.attributes[PAGE_ATTRIBUTE] = PAGE
    feeds = {"x": torch.randn((5, 64))}
    target, form = (Target.ORT_CPU, Lowering.LEAN) if packed else (Target.PORTABLE, None)
    found, report = emit_and_run(module, feeds, tmp_path, target=target, lowering=form)
    assert_close(found["y"], reference(module, feeds)["y"])
    places = _places(tmp_path)
    starts = sorted({min(offsets) for offsets in places.values()})
    assert len(places) == 4
    assert all(start % PAGE == 0 for start in starts)
    for number, offsets in places.items():
        following = [start for start in starts if start > min(offsets)]
        assert all(offset < (following or [1 << 40])[0] for offset in offsets), number
    # no page that holds nothing: what the file has beyond its weights is less than a page for each expert
    stored = report.weight_bytes - 4 * 64 * 4
    assert stored <= (tmp_path / EXPERTS_FILE).stat().st_size < stored + 4 * PAGE


def _places(folder: Path) -> dict[str, list[int]]:
    """Offsets in the file of the experts, by the expert's number, which ends the names of its weights."""
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    places: dict[str, list[int]] = {}
    for item in model.graph.initializer:
        entries = {entry.key: entry.value for entry in item.external_data}
        if entries.get("location") == EXPERTS_FILE:
            places.setdefault(item.name.rpartition(".")[2], []).append(int(entries["offset"]))
    return places


@pytest.mark.parametrize(
    ("packed", "form", "options"),
    [
        (False, Lowering.LEAN, {"session.disable_prepacking": "1"}),
        (False, Lowering.FUSED, {}),
        (True, Lowering.LEAN, {}),
    ],
    ids=["float32", "float32, fused", "4 bits"],
)
def test_what_loading_needs_is_written_down_and_done(
    packed: bool, form: Lowering, options: dict[str, str], tmp_path: Path
) -> None:
    """Kernels of packed weights are slow on weights that they did not arrange, and the fused operator copies none."""
    module = _packed_layer(4, 64, 64, 2) if packed else moe_layers(LayerShape(4, 64, 96, 2))
    module.op.attributes[PAGE_ATTRIBUTE] = PAGE
    report = emit_onnx(module, tmp_path, target=Target.ORT_CPU, lowering=form)
    assert report.session is not None and report.session.options == options
    assert read_session_file(tmp_path) == report.session
    loaded = OnnxModel(tmp_path / MODEL_FILE).session.get_session_options()
    for key, value in options.items():
        assert loaded.get_session_config_entry(key) == value


@pytest.mark.parametrize("activations", list(Activations), ids=lambda value: value.value)
def test_what_was_arranged_before_computes_the_same(activations: Activations, tmp_path: Path) -> None:
    """Also where the fused operator is asked for, whose arranged weights the runtime cannot load again."""
    module = _packed_layer(8, 128, 192, 2)
    module.op.attributes[PAGE_ATTRIBUTE] = PAGE
    module.op.attributes[PREPACKED_ATTRIBUTE] = True
    options = {"activations": activations, "lowering": Lowering.FUSED}
    report = emit_onnx(module, tmp_path, target=Target.ORT_CPU, **options)
    assert report.session is not None and report.session.prepacked
    assert report.layers[0].choice.lowering is Lowering.LEAN
    assert "cannot be loaded again" in report.layers[0].choice.reason
    feeds = {"x": torch.randn((9, 128), generator=torch.Generator().manual_seed(0))}
    found = OnnxModel(tmp_path / MODEL_FILE).session.run(None, {"x": feeds["x"].numpy()})[0]
    assert_close(found, reference(module, feeds)["y"], 1e-5 if activations is Activations.FLOAT32 else 2e-2)


def test_the_manifest_says_how_to_load(tmp_path: Path) -> None:
    save_tiny_checkpoint("mixtral", tmp_path / "source")
    out = tmp_path / "out"
    moec.compile(tmp_path / "source", out, pipeline="externalize", check="none", verify=False, store=tmp_path)
    build = read_manifest(out).build
    assert build.session_options == {"session.disable_prepacking": "1"} and not build.prepacked_bytes
    assert read_session_file(out / ONNX_FOLDER).options == build.session_options
    assert (out / ONNX_FOLDER / EXPERTS_FILE).is_file()


_TOUCH = """
import sys, onnxruntime, numpy as np
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from moec.artifact.runtime import OnnxModel
def resident():
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith(("Rss:",))) * 1024
# the runtime's own code is in memory before the count starts
warm = OnnxModel(Path(sys.argv[3]) / "model.onnx", threads=1)
warm.session.run(None, {"x": np.ones((1, 64), np.float32)})
before = resident()
model = OnnxModel(Path(sys.argv[1]) / "model.onnx", threads=1)
for scale in (1.0, 2.0):
    x = np.zeros((1, int(sys.argv[4])), np.float32)
    x[0, 0] = scale
    model.session.run(None, {"x": x})
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
@pytest.mark.parametrize("packed", [False, True], ids=["float32, fused", "4 bits, prepacked"])
def test_a_run_that_uses_an_eighth_of_the_experts_keeps_few_of_them(packed: bool, tmp_path: Path) -> None:
    """64 experts, of which one token chooses 8: less than 40 % of the experts' bytes are resident."""
    hidden = 1024 if packed else 512
    module = _packed_layer(64, hidden, 768, 8) if packed else moe_layers(LayerShape(64, hidden, 512, 8))
    module.op.attributes[PAGE_ATTRIBUTE] = 65536
    report = _emit(module, tmp_path / "model", packed)
    small = _packed_layer(4, 64, 64, 2) if packed else moe_layers(LayerShape(4, 64, 96, 2))
    emit_onnx(small, tmp_path / "small", target=Target.ORT_CPU)
    arguments = [str(tmp_path / "model"), str(Path.cwd()), str(tmp_path / "small"), str(hidden)]
    done = subprocess.run([sys.executable, "-c", _TOUCH, *arguments], capture_output=True, text=True, check=True)
    experts = report.weight_bytes - 64 * hidden * 4
    share = int(done.stdout) / experts
    assert share < 0.4, f"{share:.0%} of {experts >> 20} MiB"
    facts = read_session_file(tmp_path / "model")
    assert bool(facts.prepacked) is packed
    if packed:
        assert report.session is not None
        on_disk = sum(path.stat().st_size for path in (tmp_path / "model/prepacked").iterdir())
        assert report.session.prepacked_bytes == on_disk > experts


def _emit(module: Module, folder: Path, packed: bool) -> OnnxReport:
    if not packed:
        report = emit_onnx(module, folder, target=Target.ORT_CPU)
        assert report.layers[0].choice.lowering is Lowering.FUSED
        return report
    module.op.attributes[PREPACKED_ATTRIBUTE] = True
    options = {"activations": Activations.INT8, "lowering": Lowering.LEAN}
    return emit_onnx(module, folder, target=Target.ORT_CPU, **options)
