"""Sizes of blocks by rule: for any kind of layer, phase, product and architecture, so that they fit shared memory.

They are the defaults where `tile_table.py` knows nothing better.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from moec.codegen.triton.architectures import Architecture
from moec.codegen.triton.spec import FLOAT, PLANE_BLOCK, LayerKind, Product


class Phase(Enum):
    """How many rows an expert has: one slot at a time, up to 16, or more."""

    SLOTS = "slots"
    FEW = "few"
    MANY = "many"


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of a block, the warps of a program and the stages of its pipeline."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def tile_for(kind: LayerKind, phase: Phase, product: Product, wanted: Architecture) -> Tile:
    """The tile of a product, with as many stages as fit an architecture."""
    wide = kind.element.nbytes == 2
    if phase is Phase.MANY:
        tile = Tile(64, 64, 64, 4, 3) if wide else Tile(32, 32, 32, 4, 3)
    else:
        # few warps: what a warp does for the rows, it does for more columns
        tile = Tile(16, 64, 64, 2, 4) if wide else Tile(16, 32, 32, 2, 4)
        if wide and product.formats == (FLOAT,) and len(product.results) == 1:
            tile = replace(tile, block_k=128, stages=3)
        if wide and phase is Phase.SLOTS and wanted.is_nvidia:
            # the right side of a matrix instruction has 8 columns there, and a slot is one row
            tile = replace(tile, block_m=8)
    if wide and any(item.parts > 1 or item.zero_points for item in product.formats):
        # sums of groups and of rows take registers beside those of the result
        if phase is Phase.MANY:
            tile = replace(tile, block_m=64 // len(product.results), block_n=32)
        else:
            # 32 threads of AMD hold half of what 64 do, and loads ahead of their use stay in registers there
            other = replace(tile, warps=128 // wanted.warp, stages=2)
            tile = replace(tile, block_m=8) if wanted.is_nvidia else other
    if any(item.two_levels for item in product.formats):
        # the sum of sizes is a second result
        tile = replace(tile, block_n=min(tile.block_n, 32))
    if not wide and not product.scaled:
        # loads further ahead take registers beside those of products without matrix instructions
        tile = replace(tile, stages=2)
    elif not wide and phase is not Phase.MANY:
        # these hold whole rows in registers, and loads ahead of their use
        in_groups = any(item.parts > 1 or item.zero_points for item in product.formats)
        tile = replace(tile, block_n=16, warps=4, stages=4 if in_groups else 2)
    if wide and phase is not Phase.SLOTS and len(product.formats) > 1 and len(product.results) > 1:
        # the registers of all formats are held at once
        zero_points = phase is Phase.FEW and any(item.zero_points for item in product.formats)
        tile = replace(tile, block_m=min(tile.block_m, 16), block_n=16 if zero_points else 32, warps=2)
    while tile.stages > 1 and shared_memory(kind, product, tile) > wanted.shared_bytes:
        tile = replace(tile, stages=tile.stages - 1)
    while tile.block_n > 16 and shared_memory(kind, product, tile) > wanted.shared_bytes:
        tile = replace(tile, block_n=tile.block_n // 2)
    return tile


def shared_memory(kind: LayerKind, product: Product, tile: Tile) -> int:
    """Bytes that the pipeline of the widest format holds at once; an upper bound of what the compiler takes."""
    largest = 0
    for item in product.formats:
        depth = item.step(kind.element) if item.packed else tile.block_k
        weight_bytes = item.bits / 8 if item.packed else kind.element.nbytes
        weights = len(product.results) * tile.block_n * depth * weight_bytes
        rows = tile.block_m * depth * kind.element.nbytes
        # unpacked numbers pass through shared memory once where they come in another layout than they are used
        unpacked = len(product.results) * tile.block_n * depth * kind.element.nbytes if item.packed else 0
        largest = max(largest, int(tile.stages * (weights + rows) + unpacked))
    return largest


def interpreted_tile(kind: LayerKind, phase: Phase, product: Product) -> Tile:
    """Large blocks: in Triton's interpreter each operation costs the same, whatever its size."""
    columns = max(16, min(512, _power_of_two(product.rows if product.results == ("down",) else kind.largest_width)))
    depth = max(16, min(512, _power_of_two(product.columns or kind.largest_width)))
    rows = 64 if phase is Phase.MANY else 16
    return Tile(rows, columns, max(depth, 16) if not product.scaled else PLANE_BLOCK, 1, 1)


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
