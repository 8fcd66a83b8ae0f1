"""Kernels as files for hosts that launch them through a driver, without Python: cubins and code objects, and a list.

Triton 3 has no public way to load a binary: its launcher compiles, or finds what it compiled in its own cache. A
generated package therefore does not read these files. A host loads one with `cuModuleLoadData` or `hipModuleLoadData`
and launches `entry` with the grid that `launch.py` computes for the kernel of that name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moec.codegen.triton.ahead import Compiled, Launch, Package, argument_type, compile_launch
from moec.codegen.triton.architectures import Architecture

BINARIES_FOLDER = "binaries"
BINARIES_FILE = "kernels.json"
SCRATCH_POINTERS = 2
"""Memory for all programs and for profiling, which Triton 3.9 appends to every kernel and these do not use."""


@dataclass(frozen=True)
class BinaryRow:
    """One file and how it is launched.

    `arguments` are the kernel's in order, as (name, type of Triton): pointers aligned to 16 bytes, and 32-bit integers.
    Behind them come `scratch_pointers` more, which may be null. `constants` were compiled in; the blocks among them
    decide the grid. `threads` are those of a program, `shared_bytes` its dynamic shared memory.
    """

    file: str
    entry: str
    kernel: str
    phase: str
    arguments: tuple[tuple[str, str], ...]
    scratch_pointers: int
    constants: dict[str, object]
    threads: int
    shared_bytes: int


def write_binaries(package: Package, architectures: Sequence[Architecture], folder: Path) -> None:
    """Writes the binaries of all kernels, and `BINARIES_FILE`, into a new folder. Raises as `compile_launch`."""
    rows = []
    for architecture in architectures:
        (folder / architecture.name).mkdir(parents=True)
        for launch in package.launches(architecture):
            found = compile_launch(launch, architecture, package.element)
            file = f"{architecture.name}/{_stem(launch)}.{'cubin' if architecture.is_nvidia else 'hsaco'}"
            (folder / file).write_bytes(found.binary)
            rows.append(_row(file, found, package))
    text = json.dumps([asdict(row) for row in rows], indent=1)
    (folder / BINARIES_FILE).write_text(f"{text}\n", encoding="utf-8")


def _stem(launch: Launch) -> str:
    """Kernels without weights are told apart by their constants."""
    parts = [launch.kind, launch.phase.value if launch.phase else "", launch.name]
    parts += [] if launch.kind else [str(value) for _, value in launch.constants]
    return "-".join(part for part in parts if part)


def _row(file: str, found: Compiled, package: Package) -> BinaryRow:
    launch = found.launch
    constants = dict(launch.constants)
    return BinaryRow(
        file=file,
        entry=found.entry,
        kernel=launch.name,
        phase=launch.phase.value if launch.phase else "",
        arguments=tuple(
            (name, argument_type(name, package.element)) for name in launch.function.arg_names if name not in constants
        ),
        scratch_pointers=SCRATCH_POINTERS,
        constants=constants,
        threads=found.warps * found.architecture.warp,
        shared_bytes=found.shared_bytes,
    )
