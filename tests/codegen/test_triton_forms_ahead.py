"""Kernels of factored, shared and two-level experts compiled for sm90 without a GPU: they fit and do not spill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moec.codegen.triton.activation import LINEAR
from moec.codegen.triton.ahead import Package, compile_launch
from moec.codegen.triton.architectures import architecture
from moec.codegen.triton.emit import LAYERS_FILE, TILES_FILE
from moec.codegen.triton.metrics import measure
from moec.codegen.triton.reading import read_layer
from moec.codegen.triton.rendering import render_package
from moec.codegen.triton.spec import Element, Factors, LayerKind, MatrixFormat
from moec.codegen.triton.tiles import tile_table
from moec.dialects.moe import Routing
from moec.experts import find_moe_layers
from tests.codegen.triton_layers import Case, build

_TWO_LEVELS = (MatrixFormat(2, 1, two_levels=True),)
_LAUNCHES_OF_ALL = frozenset({"count_slots", "scan_counts", "place_slots", "combine", "route"})


def _large() -> LayerKind:
    """The sizes of DeepSeek-V2-Lite (hidden 2048, width 1408, 6 of 64, two shared experts) as specification alone."""
    module = build([Case("small")])
    small = read_layer(find_moe_layers(module.op)[0], module.weights, Element.BFLOAT16).kind
    return replace(
        small,
        hidden_size=2048,
        outputs=64,
        experts=64,
        top_k=6,
        routing=Routing(k=6),
        width=1408,
        largest_width=1408,
    )


def _kinds() -> dict[str, LayerKind]:
    large = _large()
    return {
        "every form at once": replace(
            large,
            experts=66,
            width=0,
            activations=(*large.activations, LINEAR),
            biases=True,
            scattered=(True, True),
            optional=(True, True),
            factors=Factors(512, True, 1024, 512, True, 512),
            shared_gates=(-1, 0),
        ),
        "trits of two levels": replace(large, input_formats=_TWO_LEVELS, output_formats=_TWO_LEVELS),
    }


def _package(kind: LayerKind, folder: Path) -> Package:
    for name, text in render_package([kind]).items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / TILES_FILE).write_text(json.dumps(tile_table([kind])), encoding="utf-8")
    layers = {"element": kind.element.value, "kinds": 1, "layers": []}
    (folder / LAYERS_FILE).write_text(json.dumps(layers), encoding="utf-8")
    return Package.open(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["every form at once", "trits of two levels"])
def test_no_kernel_spills(name: str, tmp_path: Path) -> None:
    package, target = _package(_kinds()[name], tmp_path), architecture("sm90")
    launches = [launch for launch in package.launches(target) if launch.name not in _LAUNCHES_OF_ALL]
    assert len(launches) > 5
    for launch in launches:
        assert measure(compile_launch(launch, target, package.element)).spills == 0, launch


@pytest.mark.slow
def test_one_token_is_a_constant(tmp_path: Path) -> None:
    """Triton makes a constant of an argument that is 1, which is no tensor then."""
    package, target = _package(_kinds()["every form at once"], tmp_path), architecture("sm90")
    for launch in package.launches(target):
        if "tokens" in launch.function.arg_names and launch.name in ("gate_up_slots", "input_right_slots"):
            one = replace(launch, constants=(*launch.constants, ("tokens", 1)))
            assert measure(compile_launch(one, target, package.element)).products > 0
