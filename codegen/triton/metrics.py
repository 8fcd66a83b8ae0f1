"""What a binary says of its speed: registers, spills, occupancy, instructions in the loop that holds the products."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from moec.codegen.triton.ahead import Compiled
from moec.codegen.triton.architectures import Architecture
from moec.codegen.triton.assembly import Code, read_amdgcn, read_sass
from moec.errors import ResourceError

_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_SHARED_UNIT = 1024  # what the driver takes of shared memory for itself in every program


@dataclass(frozen=True)
class Metrics:
    """Of one kernel. `spills`: instructions that save registers to memory, on AMD the registers saved.

    `occupancy` is the share of a unit's threads that its registers, shared memory and threads let run at once.
    `loop`: instructions of one warp in an innermost loop with matrix instructions (that which has most of them for what
    it multiplies), `products` those among them, `multiplied` how many products with weights they make; all 0 where
    there is no such loop. `narrow_loads`: loads of less than 8 bytes in it.
    """

    registers: int
    spills: int
    shared_bytes: int
    programs: int
    occupancy: float
    loop: int
    products: int
    multiplied: int
    narrow_loads: int


def measure(compiled: Compiled) -> Metrics:
    """Takes a binary apart. Raises ResourceError where the tools that come with triton do not run."""
    architecture = compiled.architecture
    registers, spills, code = _cubin(compiled.binary) if architecture.is_nvidia else _code_object(compiled.assembly)
    body = code.loop()
    programs = _programs(architecture, registers, compiled.shared_bytes, compiled.warps)
    return Metrics(
        registers=registers,
        spills=spills,
        shared_bytes=compiled.shared_bytes,
        programs=programs,
        occupancy=programs * compiled.warps * architecture.warp / architecture.threads,
        loop=len(body),
        products=sum(item.is_product for item in body),
        multiplied=sum(item.multiplied for item in body),
        narrow_loads=sum(_is_narrow(item.name) for item in body),
    )


def instructions_per_weight(compiled: Compiled, metrics: Metrics) -> float | None:
    """Instructions of a thread in the loop for each weight that it multiplies by a block of rows.

    How many weights one pass of the loop takes is what its matrix instructions multiply. None where it has none, or
    some of another shape than a warp's.
    """
    tile = compiled.launch.tile
    if tile is None or not metrics.multiplied:
        return None
    return metrics.loop * compiled.architecture.warp * tile.block_m / metrics.multiplied


def _cubin(binary: bytes) -> tuple[int, int, Code]:
    """(registers, spilling instructions, instructions)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        resources = _RESOURCES.search(_tool("cuobjdump", "--dump-resource-usage", file.name))
        code = read_sass(_tool("nvdisasm", "-c", file.name))
    if resources is None:
        raise ResourceError("cuobjdump does not say what a kernel uses")
    return int(resources.group(1)), sum(item.name.startswith(("STL", "LDL")) for item in code.instructions), code


def _code_object(assembly: str) -> tuple[int, int, Code]:
    """The same of AMD's assembly text; scalar registers are not counted."""
    return _count(assembly, "vgpr_count"), _count(assembly, "vgpr_spill_count"), read_amdgcn(assembly)


def _count(assembly: str, key: str) -> int:
    found = re.search(rf"\.{key}:\s+(\d+)", assembly)
    if found is None:
        raise ResourceError(f"the assembly does not say its {key}")
    return int(found.group(1))


def _programs(architecture: Architecture, registers: int, shared_bytes: int, warps: int) -> int:
    """Programs that fit a unit at once."""
    unit = 256 if architecture.is_nvidia else 8 * architecture.warp
    per_warp = math.ceil(registers * architecture.warp / unit) * unit
    limits = [
        architecture.registers // max(per_warp * warps, 1),
        architecture.threads // (warps * architecture.warp),
        architecture.blocks,
    ]
    if shared_bytes:
        taken = shared_bytes + (_SHARED_UNIT if architecture.is_nvidia else 0)
        limits.append(architecture.unit_shared_bytes // taken)
    return min(limits)


def _is_narrow(name: str) -> bool:
    if name.startswith(("LDG.", "LDGSTS.")):
        return ".128" not in name and ".64" not in name
    return name.startswith(("global_load", "buffer_load")) and not re.search(r"(x2|x4|b64|b128)", name)


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    try:
        done = subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ResourceError(f"{name}, which comes with triton, does not run: {error}", where=str(path)) from error
    return done.stdout
