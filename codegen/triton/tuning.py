"""Makes the tables of tiles from compiled binaries: `python -m moec.codegen.triton.tuning sm90,gfx942`.

No GPU is needed, and nothing is timed: of the tiles that compile and fit, those that spill fewest registers go first,
then those whose instructions take no longer to issue than memory and matrix products do, then those with fewest of
them (`prediction.py`). A tile that is good in both is taken at once. Where there is a GPU, `measure_tiles` of a
generated package measures times.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from moec.codegen.triton.activation import ActivationSource
from moec.codegen.triton.ahead import Launch, Package, compile_launch
from moec.codegen.triton.architectures import Architecture, parse_architectures
from moec.codegen.triton.emit import write_package
from moec.codegen.triton.metrics import Metrics, instructions_per_weight, measure
from moec.codegen.triton.prediction import Prediction, gpu_of, predict
from moec.codegen.triton.spec import FLOAT, Element, LayerKind, MatrixFormat, RouteOperands
from moec.codegen.triton.tile_table import PRODUCTS, TABLES, shape_key
from moec.codegen.triton.tiles import Phase, Tile, tile_for
from moec.dialects.moe import Routing
from moec.errors import ResourceError

_TERNARY, _INT4 = MatrixFormat(2, 1), MatrixFormat(4, 8, 128)
_DEFAULT_INT4 = MatrixFormat(4, 8, 32, zero_points=True)
SHIPPED_FORMATS: dict[str, tuple[MatrixFormat, ...]] = {
    "float": (FLOAT,),
    "int8": (MatrixFormat(8),),
    "int4": (_INT4,),
    "int4 by default": (_DEFAULT_INT4,),  # what `quantize{bits=4}` makes
    "ternary": (_TERNARY,),
    "mixed": (_TERNARY, _INT4),
}
"""Formats of the layers that tables list; several in one layer are for experts of their own widths."""

ENOUGH = 1.5
"""Instructions that take so much longer to issue than the other limits; counts tell tiles apart no better."""

_SWIGLU = ActivationSource(
    True, ("return gate * tl.sigmoid(gate) * up",), ("return torch.nn.functional.silu(gate) * up",)
)


def large_layer(formats: tuple[MatrixFormat, ...], element: Element = Element.BFLOAT16) -> LayerKind:
    """A layer of the sizes of DeepSeek-V2-Lite (hidden 2048, width 1408, 6 of 64 experts) without weights."""
    return LayerKind(
        element=element,
        hidden_size=2048,
        outputs=64,
        experts=64,
        top_k=6,
        routing=Routing(k=6),
        route_operands=RouteOperands(),
        router=None,
        identity=True,
        activations=(_SWIGLU,),
        width=1408 if len(formats) == 1 else 0,
        largest_width=1408,
        biases=False,
        input_formats=formats,
        output_formats=formats,
    )


@dataclass(frozen=True)
class Candidate:
    """A tile and what its binary takes; `instructions` are those of a thread for a weight."""

    tile: Tile
    metrics: Metrics
    instructions: float
    prediction: Prediction

    @property
    def good(self) -> bool:
        """Whether no other tile needs to be tried."""
        return self.metrics.spills == 0 and self.prediction.issue <= ENOUGH

    @property
    def cost(self) -> tuple[int, float, float]:
        """Smaller is better."""
        return self.metrics.spills, max(self.prediction.issue, 1.0), self.prediction.issue


def candidates(kind: LayerKind, phase: Phase, product: str, wanted: Architecture) -> tuple[Tile, ...]:
    """The tile by rule, then others of its neighbourhood, each once."""
    first = tile_for(kind, phase, kind.gate_up if product == "gate_up" else kind.down, wanted)
    if phase is Phase.MANY:
        sizes = ((32, 32, 4), (32, 64, 4), (64, 64, 8))
        others = [replace(first, block_m=rows, block_n=columns, warps=warps) for rows, columns, warps in sizes]
    else:
        others = [replace(first, block_n=32), replace(first, warps=2 * first.warps), replace(first, block_n=16)]
    return tuple(dict.fromkeys((first, *others)))


def tune(wanted: Architecture, formats: tuple[MatrixFormat, ...]) -> Iterator[tuple[str, Candidate]]:
    """The best tile of each product of a large layer in each phase, by its key in the table."""
    kind = large_layer(formats)
    with tempfile.TemporaryDirectory(prefix="moec-tuning-") as scratch:
        package = write_package([kind], Path(scratch))
        for launch in package.launches(wanted):
            if launch.product not in PRODUCTS or launch.phase is None:
                continue
            key = shape_key(kind, launch.phase, launch.product)
            assert key is not None
            yield key.text, _best(kind, launch, wanted, package)


def _best(kind: LayerKind, launch: Launch, wanted: Architecture, package: Package) -> Candidate:
    assert launch.phase is not None
    facts = kind.gate_up if launch.product == "gate_up" else kind.down
    best: Candidate | None = None
    for tile in candidates(kind, launch.phase, launch.product, wanted):
        try:
            compiled = compile_launch(launch.with_tile(tile), wanted, package.element)
        except ResourceError:
            continue
        metrics = measure(compiled)
        instructions = instructions_per_weight(compiled, metrics)
        if instructions is None:
            continue
        bits = facts.fewest_bits(kind.element)
        prediction = predict(gpu_of(wanted.name), launch.phase, tile.block_m, bits, instructions)
        found = Candidate(tile, metrics, instructions, prediction)
        if best is None or found.cost < best.cost:
            best = found
        if best.good:
            break
    if best is None:
        raise ResourceError(f"no tile of {launch.name} fits {wanted.name}", where=f"{launch.phase.value}")
    return best


def table_of(wanted: Architecture) -> dict[str, Any]:
    """The content of the table of an architecture. Raises ResourceError where no tile fits."""
    import triton

    entries = {}
    for formats in SHIPPED_FORMATS.values():
        for key, found in tune(wanted, formats):
            entries[key] = {
                "tile": list(astuple(found.tile)),
                "registers": found.metrics.registers,
                "spills": found.metrics.spills,
                "shared_bytes": found.metrics.shared_bytes,
                "instructions_per_weight": round(found.instructions, 2),
                "bound": found.prediction.bound.value,
                "issue": round(found.prediction.issue, 2),
            }
    return {"gpu": gpu_of(wanted.name).name, "triton": triton.__version__, "entries": entries}


def write_table(table: dict[str, Any], path: Path) -> None:
    """One line for each entry."""
    head = {name: value for name, value in table.items() if name != "entries"}
    lines = [f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in table["entries"].items()]
    text = json.dumps(head)[:-1] + ', "entries": {\n' + ",\n".join(lines) + "\n}}\n"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for item in parse_architectures(",".join(sys.argv[1:])):
        write_table(table_of(item), TABLES / f"{item.name}.json")
