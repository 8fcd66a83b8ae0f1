"""Writes the package of kernels of a module: source, tables, and one file of packed weights for each layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from moec.codegen.triton.ahead import Package
from moec.codegen.triton.reading import layers_of, read_layer
from moec.codegen.triton.rendering import PACKAGE_NAME, render_package
from moec.codegen.triton.spec import Element, LayerKind
from moec.codegen.triton.tile_table import tile_table
from moec.module import Module

LAYERS_FILE = "layers.json"
TILES_FILE = "tiles.json"
WEIGHTS_FOLDER = "weights"


@dataclass(frozen=True)
class TritonReport:
    """What was written: the kinds of layers, how many layers there are, and the bytes of their weights."""

    kinds: tuple[LayerKind, ...]
    layers: int
    weight_bytes: int


def emit_triton(module: Module, folder: Path, *, element: Element) -> TritonReport:
    """Writes the package into `folder / PACKAGE_NAME`. Memory is that of one layer.

    Raises UnsupportedModelError for a layer that the kernels do not cover, with the reason.
    """
    package = folder / PACKAGE_NAME
    (package / WEIGHTS_FOLDER).mkdir(parents=True, exist_ok=True)
    kinds: list[LayerKind] = []
    rows: list[dict[str, object]] = []
    weight_bytes = 0
    for number, layer in enumerate(layers_of(module)):
        found = read_layer(layer, module.weights, element)
        if found.kind not in kinds:
            kinds.append(found.kind)
        file = f"{WEIGHTS_FOLDER}/layer_{number:03d}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in found.tensors.items()}, str(package / file))
        weight_bytes += sum(tensor.nbytes for tensor in found.tensors.values())
        with_it = [name for shared in found.block.shared for name in shared.modules]
        rows.append({"name": found.name, "kind": kinds.index(found.kind), "weights": file, "shared": with_it})
    _write_source(kinds, rows, package)
    return TritonReport(tuple(kinds), len(rows), weight_bytes)


def write_package(kinds: Sequence[LayerKind], folder: Path) -> Package:
    """Writes and opens a package of kinds of layers without any layer, which compiles and has nothing to run."""
    _write_source(kinds, [], folder)
    return Package.open(folder)


def _write_source(kinds: Sequence[LayerKind], layers: Sequence[dict[str, object]], package: Path) -> None:
    for name, text in render_package(kinds).items():
        (package / name).write_text(text, encoding="utf-8")
    element = kinds[0].element.value
    _write_json(package / LAYERS_FILE, {"element": element, "kinds": len(kinds), "layers": layers})
    _write_json(package / TILES_FILE, tile_table(kinds))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
