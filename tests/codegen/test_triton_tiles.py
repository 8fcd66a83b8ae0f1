"""Sizes of blocks: the shipped tables, the rule beside them, the tuner, and what a generated package does with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moec.codegen.triton import tuning
from moec.codegen.triton.ahead import Compiled, Launch
from moec.codegen.triton.architectures import ARCHITECTURES, Architecture, architecture
from moec.codegen.triton.emit import TILES_FILE, emit_triton
from moec.codegen.triton.metrics import Metrics
from moec.codegen.triton.rendering import PACKAGE_NAME
from moec.codegen.triton.spec import FLOAT, Element, Factors, LayerKind, MatrixFormat
from moec.codegen.triton.tile_table import PRODUCTS, TABLES, Origin, choose_tile, shape_key, tile_table
from moec.codegen.triton.tiles import Phase, Tile, shared_memory
from moec.codegen.triton.tuning import SHIPPED_FORMATS, candidates, large_layer, table_of, write_table
from moec.errors import ResourceError
from tests.codegen.triton_layers import HIDDEN, Case, build

ODD = (MatrixFormat(4, 8, 32, zero_points=True), MatrixFormat(2, 1, two_levels=True), MatrixFormat(8, 0, 16))


@pytest.mark.parametrize("name", [item.name for item in ARCHITECTURES])
def test_shipped_tables(name: str) -> None:
    """Every shape has a tile that compiled, fits, and on sm90 keeps everything in registers."""
    entries = json.loads((TABLES / f"{name}.json").read_text(encoding="utf-8"))["entries"]
    wanted = []
    for formats in SHIPPED_FORMATS.values():
        kind = large_layer(formats)
        for phase in Phase:
            for product in PRODUCTS:
                key = shape_key(kind, phase, product)
                assert key is not None
                wanted.append(key.text)
                tile, origin = choose_tile(kind, phase, product, architecture(name))
                assert origin is Origin.TABLE and entries[key.text]["tile"] == [*vars(tile).values()]
                assert tile in candidates(kind, phase, product, architecture(name))
    assert sorted(wanted) == sorted(entries)
    for key, row in entries.items():
        assert row["shared_bytes"] <= architecture(name).shared_bytes, key
        assert name != "sm90" or row["spills"] == 0, key


def _small(kind: LayerKind) -> LayerKind:
    return replace(kind, hidden_size=64)


UNLISTED = {
    "a small hidden size": _small(large_layer((FLOAT,))),
    "formats of no table": large_layer(ODD),
    "float32": large_layer((FLOAT,), Element.FLOAT32),
    "factors": replace(large_layer((FLOAT,)), factors=Factors(input_rank=64, own_input=True)),
}


@pytest.mark.parametrize("name", list(UNLISTED))
def test_a_shape_of_no_table_gets_a_tile_that_fits(name: str) -> None:
    kind = UNLISTED[name]
    for wanted in ARCHITECTURES:
        for phase in Phase:
            for product, facts in zip(PRODUCTS, (kind.gate_up, kind.down), strict=True):
                tile, origin = choose_tile(kind, phase, product, wanted)
                assert origin is Origin.RULE and shared_memory(kind, facts, tile) <= wanted.shared_bytes


def test_artifacts_have_tiles_for_every_device() -> None:
    kinds = [large_layer((FLOAT,)), *UNLISTED.values()]
    table = tile_table(kinds)
    assert set(table) == {"default", "interpreter", *(item.name for item in ARCHITECTURES)}
    for entries in table.values():
        assert len(entries) == len(kinds) * len(Phase) * len(PRODUCTS)
    assert {row["from"] for row in table["default"].values()} == {"rule"}
    assert {row["from"] for row in table["sm90"].values()} == {"rule", "table"}


def test_the_tuner_takes_the_first_good_tile_else_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By binaries that are made up: the tile by rule spills, and one of 16 columns does not fit."""

    def compiled(launch: Launch, wanted: Architecture, element: Element) -> Compiled:
        assert launch.tile is not None
        if launch.tile.block_n == 16:
            raise ResourceError("too large")
        return Compiled(launch, wanted, b"", "", 4096, launch.warps, "")

    def measured(found: Compiled) -> Metrics:
        tile = found.launch.tile
        assert tile is not None
        spills = 8 if tile.block_n == 64 else 0
        return Metrics(100, spills, 4096, 1, 0.5, 100, 1, 100, 0)

    monkeypatch.setattr(tuning, "compile_launch", compiled)
    monkeypatch.setattr(tuning, "measure", measured)
    monkeypatch.setattr(
        tuning, "instructions_per_weight", lambda found, _: 2.0 if found.launch.phase is not Phase.MANY else 200.0
    )
    monkeypatch.setattr(tuning, "SHIPPED_FORMATS", {"float": (FLOAT,)})
    table = table_of(architecture("sm90"))
    assert len(table["entries"]) == 6
    for key, row in table["entries"].items():
        assert row["spills"] == 0 and row["tile"][1] == 32, key
        assert row["bound"] == ("issue" if "many" in key else "memory")
    write_table(table, tmp_path / "sm90.json")
    assert json.loads((tmp_path / "sm90.json").read_text(encoding="utf-8")) == table


# sizes of an unknown device, of a key that no table has, and of measured tiles; then what measuring itself does
PROGRAM = """
import json, sys, torch
from pathlib import Path
from moec.codegen.triton.interpreter import repair
from moec.codegen.triton.running import import_package
repair()
package = import_package(Path(sys.argv[1]))
tiles = package.measuring.tiles
default = json.loads((Path(sys.argv[1]) / "tiles.json").read_text())["default"]["kind_0/few/down"]["tile"]
assert tiles.tile("sm75", "kind_0", "few", "down") == tiles.Tile(*default)
assert tiles.tile("sm90", "kind_7", "few", "down") == tiles.SMALLEST
block = package.load_layer(0)
rows = torch.randn(5, {hidden}, generator=torch.Generator().manual_seed(0))
expected = block(rows)
real = tiles.architecture
tiles.architecture = lambda device: "sm75"
package.launch.architecture = tiles.architecture
assert (block(rows) - expected).abs().max() < 1e-5
tiles.tile.cache_clear()
tiles._table()["default"].clear()
assert (block(rows) - expected).abs().max() < 1e-5
tiles.architecture = package.launch.architecture = real
found = package.measure_tiles(sys.argv[2], "cpu", phases=("slots",), rounds=1)
assert sorted(found) == ["kind_0/slots/down", "kind_0/slots/gate_up"], found
assert all(row["milliseconds"] > 0 for row in found.values())
print("done")
"""


def _run(program: str, *arguments: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program.format(hidden=HIDDEN), *map(str, arguments)],
        env={**os.environ, "TRITON_INTERPRET": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


READ = """
import sys
from pathlib import Path
from moec.codegen.triton.running import import_package
package = import_package(Path(sys.argv[1]))
print(package.measuring.tiles.tile("interpreter", "kind_0", "slots", "down"))
"""


@pytest.mark.slow
def test_packages_never_lack_a_tile_and_take_measured_ones(tmp_path: Path) -> None:
    emit_triton(build([Case("equal")]), tmp_path, element=Element.FLOAT32)
    package, measured = tmp_path / PACKAGE_NAME, tmp_path / "measured.json"
    done = _run(PROGRAM, package, measured)
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr
    written = json.loads(measured.read_text(encoding="utf-8"))
    written["tiles"]["interpreter"]["kind_0/slots/down"]["tile"] = [16, 16, 16, 1, 1]
    measured.write_text(json.dumps(written), encoding="utf-8")
    done = _run(READ, package, MOEC_TILES=str(measured))
    assert done.stdout.strip() == str(Tile(16, 16, 16, 1, 1)), done.stderr
    measured.write_text(json.dumps({**written, "package": "another"}), encoding="utf-8")
    assert "measured for other kernels" in _run(READ, package, MOEC_TILES=str(measured)).stderr
    assert json.loads((package / TILES_FILE).read_text(encoding="utf-8"))["interpreter"]
