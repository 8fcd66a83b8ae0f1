"""Compiles the kernels of a package ahead of time, for any architecture and without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from moec.codegen.triton.architectures import Architecture
from moec.codegen.triton.other_kernels import other_kernels
from moec.codegen.triton.running import INTERPRET, require_triton
from moec.codegen.triton.spec import Element
from moec.codegen.triton.tile_table import Origin
from moec.codegen.triton.tiles import Phase, Tile
from moec.errors import ResourceError, UsageError

_POINTEES = {
    "logits": "fp32",
    "gates": "fp32",
    "ids": "i64",
    "stored": "i32",
    "table": "i64",
    "order": "i32",
    "counts": "i32",
    "starts": "i32",
    "totals": "i32",
    "biases": "fp32",
    "mask": "i32",
    "logit_bias": "fp32",
    "select_bias": "fp32",
    "per_expert_scale": "fp32",
    "parts": "i32",
    "new_ids": "i64",
    "new_gates": "fp32",
    "shared_gates": "fp32",
}
_ELEMENTS = {Element.FLOAT32: "fp32", Element.FLOAT16: "fp16", Element.BFLOAT16: "bf16"}
_ELEMENT_POINTERS = frozenset(
    {"x", "hidden", "y", "result", "float", "inner", "outer", "latent"}
    | {f"{side}_{factor}" for side in ("input", "output") for factor in ("left", "right", "latent")}
)
_CHUNK, _SCAN_ROWS, _LARGEST_BLOCK = 128, 16, 1024


@dataclass(frozen=True)
class Launch:
    """A kernel as the launcher starts it: `kind` and `product` are empty for kernels without weights.

    `origin` says where the tile comes from.
    """

    name: str
    function: Any
    constants: tuple[tuple[str, object], ...]
    warps: int
    stages: int
    kind: str = ""
    product: str = ""
    phase: Phase | None = None
    tile: Tile | None = None
    origin: Origin | None = None

    def with_tile(self, tile: Tile) -> Launch:
        """The same kernel with blocks of other sizes."""
        sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
        constants = tuple((name, sizes.get(name, value)) for name, value in self.constants)
        return replace(self, constants=constants, warps=tile.warps, stages=tile.stages, tile=tile)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made: a cubin or a code object, its assembly text (of AMD), shared memory and warps."""

    launch: Launch
    architecture: Architecture
    binary: bytes
    assembly: str
    shared_bytes: int
    warps: int
    entry: str


@dataclass(frozen=True)
class Package:
    """A package of kernels on disk, without its weights: the modules of its kinds, and its tables."""

    folder: Path
    element: Element
    kinds: tuple[ModuleType, ...]
    sorting: ModuleType
    tiles: dict[str, dict[str, dict[str, Any]]]

    @staticmethod
    def open(folder: Path) -> Package:
        """Imports the sources of kernels in `folder`. Raises UsageError without triton, or where it interprets."""
        require_triton("compiling its kernels")
        if os.environ.get(INTERPRET) == "1":
            raise UsageError(f"kernels cannot be compiled while {INTERPRET}=1", hint="unset it")
        layers = json.loads((folder / "layers.json").read_text(encoding="utf-8"))
        kinds = tuple(_import(folder / f"kind_{number}.py") for number in range(layers["kinds"]))
        tiles = json.loads((folder / "tiles.json").read_text(encoding="utf-8"))
        return Package(folder, Element(layers["element"]), kinds, _import(folder / "sorting.py"), tiles)

    def launches(self, architecture: Architecture) -> Iterator[Launch]:
        """Every kernel with every tile that the launcher may take on an architecture."""
        for kind in self.kinds:
            yield Launch("route", kind.route, (("BLOCK_T", kind.ROUTE_TOKENS),), 4, 3, kind.NAME)
            for phase in Phase:
                grouped = phase is not Phase.SLOTS
                for product, columns in (("gate_up", kind.INPUT_COLUMNS), ("down", kind.OUTPUT_COLUMNS)):
                    row = self.tiles[architecture.name][f"{kind.NAME}/{phase.value}/{product}"]
                    tile = Tile(*row["tile"])
                    name = (
                        f"{product}_grouped"
                        if grouped
                        else {"gate_up": "gate_up_slots", "down": "down_tokens"}[product]
                    )
                    constants = (
                        ("BLOCK_M", tile.block_m),
                        ("BLOCK_N", tile.block_n),
                        ("BLOCK_K", tile.block_k),
                        ("WHOLE", columns > 0 and columns % tile.block_k == 0),
                    )
                    yield Launch(
                        name,
                        getattr(kind, name),
                        constants,
                        tile.warps,
                        tile.stages,
                        kind.NAME,
                        product,
                        phase,
                        tile,
                        Origin(row["from"]),
                    )
            yield from self._others(kind, architecture)
        for experts in sorted({kind.EXPERTS for kind in self.kinds}):
            sizes = (("EXPERTS", experts), ("BINS", 1 << experts.bit_length()))
            for name, last in (("count_slots", "CHUNK"), ("scan_counts", "ROWS"), ("place_slots", "CHUNK")):
                size = _SCAN_ROWS if last == "ROWS" else _CHUNK
                yield Launch(name, getattr(self.sorting, name), (*sizes, (last, size)), 4, 3)
        for hidden, top_k in sorted({(kind.HIDDEN_SIZE, kind.SLOTS) for kind in self.kinds}):
            block = min(_LARGEST_BLOCK, 1 << (hidden - 1).bit_length())
            yield Launch(
                "combine", self.sorting.combine, (("HIDDEN", hidden), ("TOP_K", top_k), ("BLOCK", block)), 4, 3
            )

    def _others(self, kind: ModuleType, architecture: Architecture) -> Iterator[Launch]:
        for item in other_kernels(kind):
            function = getattr(kind, item.name)
            if not item.product:
                yield Launch(item.name, function, item.constants, 4, 3, kind.NAME, "", item.phase)
                continue
            tile = Tile(*self.tiles[architecture.name][f"{kind.NAME}/{item.phase.value}/{item.product}"]["tile"])
            whole = item.name == "latent_rows" and kind.HIDDEN_SIZE % tile.block_k == 0
            sizes = (("BLOCK_M", tile.block_m), ("BLOCK_N", tile.block_n), ("BLOCK_K", tile.block_k), ("WHOLE", whole))
            constants = (*item.constants, *sizes)
            yield Launch(item.name, function, constants, tile.warps, tile.stages, kind.NAME, "", item.phase)


def compile_launch(launch: Launch, architecture: Architecture, element: Element) -> Compiled:
    """Compiles one kernel. Raises ResourceError, with the compiler's words, where it does not fit the architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict(launch.constants)
    signature, attributes = {}, {}
    for position, name in enumerate(launch.function.arg_names):
        signature[name] = "constexpr" if name in constants else argument_type(name, element)
        if signature[name].startswith("*"):
            attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(launch.function, signature, constants, attributes)
    target = GPUTarget(architecture.backend, architecture.target, architecture.warp)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    try:
        with triton.knobs.compilation.scope():
            # lines would put the folder's path into the binary
            triton.knobs.compilation.disable_line_info = True
            found = triton.compile(source, target=target, options=options)
    except Exception as error:
        raise ResourceError(
            f"{launch.name} does not compile for {architecture.name}: {error}", where=f"{launch.kind} {launch.tile}"
        ) from error
    if found.metadata.shared > architecture.shared_bytes:
        raise ResourceError(
            f"{launch.name} needs {found.metadata.shared} bytes of shared memory, {architecture.name} has "
            f"{architecture.shared_bytes}",
            where=f"{launch.kind} {launch.tile}",
        )
    binary = found.asm["cubin" if architecture.is_nvidia else "hsaco"]
    assembly = "" if architecture.is_nvidia else str(found.asm["amdgcn"])
    return Compiled(
        launch, architecture, binary, assembly, found.metadata.shared, found.metadata.num_warps, found.metadata.name
    )


def argument_type(name: str, element: Element) -> str:
    """Triton's name for the type of a kernel's argument."""
    if not name.endswith("_ptr"):
        return "i32"
    pointee = name.removesuffix("_ptr")
    if pointee in _ELEMENT_POINTERS:
        return f"*{_ELEMENTS[element]}"
    if pointee in _POINTEES:
        return f"*{_POINTEES[pointee]}"
    if pointee.endswith(("_scales", "_zeros", "_shifts")):
        return "*fp32"
    return "*i8" if pointee.startswith("int8") else "*i32"


def _import(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
