"""Which tile a product gets on which architecture: what the shipped tables say for its shape, else the rule.

`tile_tables/ARCHITECTURE.json` is what `tuning.py` chose among compiled binaries, with the facts that it chose by. A
shape that they do not list, and an architecture that nothing lists, get a tile by rule that fits shared memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from moec.codegen.triton.architectures import ARCHITECTURES, Architecture
from moec.codegen.triton.spec import Factors, LayerKind
from moec.codegen.triton.tiles import Phase, Tile, interpreted_tile, tile_for

TABLES = Path(__file__).with_name("tile_tables")
DEFAULT = "default"
INTERPRETER = "interpreter"
PRODUCTS = ("gate_up", "down")
LARGE = 512
"""From this hidden size or width on, what a block does no longer depends on it: loops are long, and rows are whole."""


class Origin(Enum):
    """Where a tile comes from."""

    TABLE = "table"
    RULE = "rule"
    INTERPRETER = "interpreter"


@dataclass(frozen=True)
class ShapeKey:
    """What decides how a product compiles and runs, as tables name it.

    `results` is 2 where gate and up are one product; `formats` are names of `MatrixFormat`; `element_bits` are those of
    what is multiplied; `hidden`, `width` a size from `LARGE` on, or `ragged` for widths of their own. The phase is the
    class of tokens for each expert.
    """

    product: str
    results: int
    formats: tuple[str, ...]
    element_bits: int
    hidden: str
    width: str
    phase: Phase

    @property
    def text(self) -> str:
        """One line."""
        sizes = f"hidden {self.hidden}/width {self.width}"
        formats = "+".join(self.formats)
        return f"{self.product} {self.results}/{formats}/{self.element_bits} bit/{sizes}/{self.phase.value}"


def shape_key(kind: LayerKind, phase: Phase, product: str) -> ShapeKey | None:
    """The key of a product of a kind of layer; None for layers that the tables do not cover, such as factored ones."""
    plain = kind.factors == Factors() and not any((*kind.scattered, *kind.optional))
    large = f"from {LARGE}"
    if not plain or kind.hidden_size < LARGE or 0 < kind.width < LARGE:
        return None
    facts = kind.gate_up if product == "gate_up" else kind.down
    formats = tuple(item.name for item in facts.formats)
    bits = 8 * kind.element.nbytes
    return ShapeKey(product, len(facts.results), formats, bits, large, large if kind.width else "ragged", phase)


@cache
def _shipped(architecture: str) -> dict[str, Tile]:
    path = TABLES / f"{architecture}.json"
    if not path.is_file():
        return {}
    return {key: Tile(*row["tile"]) for key, row in json.loads(path.read_text(encoding="utf-8"))["entries"].items()}


def choose_tile(kind: LayerKind, phase: Phase, product: str, wanted: Architecture) -> tuple[Tile, Origin]:
    """The tile of a product on an architecture, and where it comes from."""
    key = shape_key(kind, phase, product)
    found = _shipped(wanted.name).get(key.text) if key is not None else None
    if found is not None:
        return found, Origin.TABLE
    return tile_for(kind, phase, kind.gate_up if product == "gate_up" else kind.down, wanted), Origin.RULE


def tile_table(kinds: Sequence[LayerKind]) -> dict[str, dict[str, dict[str, Any]]]:
    """`tiles.json`: for each architecture the tile and its origin by `kind/phase/product`.

    `default` is for devices that are not listed: tiles by rule that fit the smallest of the architectures.
    """
    smallest = min(ARCHITECTURES, key=lambda item: (item.shared_bytes, item.is_nvidia))
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for name, wanted in {DEFAULT: smallest, INTERPRETER: None, **{item.name: item for item in ARCHITECTURES}}.items():
        entries = table.setdefault(name, {})
        for number, kind in enumerate(kinds):
            for phase in Phase:
                for product in PRODUCTS:
                    facts = kind.gate_up if product == "gate_up" else kind.down
                    if wanted is None:
                        tile, origin = interpreted_tile(kind, phase, facts), Origin.INTERPRETER
                    elif name == DEFAULT:
                        tile, origin = tile_for(kind, phase, facts, wanted), Origin.RULE
                    else:
                        tile, origin = choose_tile(kind, phase, product, wanted)
                    entries[f"kind_{number}/{phase.value}/{product}"] = {
                        "tile": list(astuple(tile)),
                        "from": origin.value,
                    }
    return table
