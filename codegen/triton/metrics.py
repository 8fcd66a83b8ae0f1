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
from moec.errors import ResourceError

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)(.*)")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "IMMA", "IGMMA")
_AMD_LABEL = re.compile(r"^(\.LBB\w+):")
_AMD_INSTRUCTION = re.compile(r"^\t([a-z]\w+)(.*)")
_AMD_MATRIX = ("v_mfma", "v_wmma")
_AMD_BRANCHES = ("s_cbranch", "s_branch")
_SHARED_UNIT = 1024  # what the driver takes of shared memory for itself in every program


@dataclass(frozen=True)
class Metrics:
    """Of one kernel. `spills`: instructions that save registers to memory, on AMD the registers saved.

    `occupancy` is the share of a unit's threads that its registers, shared memory and threads let run at once.
    `loop`: instructions of one warp in an innermost loop with matrix instructions (that which has most of them for what
    it multiplies), `products` those among them, `multiplied` how many products of two numbers they make; all 0 where
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
    matrix: tuple[str, ...] = _MATRIX if architecture.is_nvidia else _AMD_MATRIX
    registers, spills, body = _cubin(compiled.binary) if architecture.is_nvidia else _code_object(compiled.assembly)
    products = sum(name.startswith(matrix) for name in body)
    programs = _programs(architecture, registers, compiled.shared_bytes, compiled.warps)
    return Metrics(
        registers=registers,
        spills=spills,
        shared_bytes=compiled.shared_bytes,
        programs=programs,
        occupancy=programs * compiled.warps * architecture.warp / architecture.threads,
        loop=len(body),
        products=products,
        multiplied=sum(map(_multiplied, body)),
        narrow_loads=sum(_is_narrow(name) for name in body),
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


def _cubin(binary: bytes) -> tuple[int, int, list[str]]:
    """(registers, spilling instructions, the loop)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        resources = _RESOURCES.search(_tool("cuobjdump", "--dump-resource-usage", file.name))
        text = _tool("nvdisasm", "-c", file.name)
    if resources is None:
        raise ResourceError("cuobjdump does not say what a kernel uses")
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        label = _LABEL.match(line)
        if label:
            labels[label.group(1)] = len(found)
            continue
        instruction = _INSTRUCTION.search(line)
        if instruction:
            found.append((instruction.group(1), instruction.group(2)))
    jumps = [
        (labels[target.group(0)], position)
        for position, (name, rest) in enumerate(found)
        if name.startswith("BRA") and (target := re.search(r"\.L_x_\d+", rest)) and target.group(0) in labels
    ]
    names = [name for name, _ in found]
    spills = sum(name.startswith(("STL", "LDL")) for name in names)
    return int(resources.group(1)), spills, _loop(names, jumps, _MATRIX)


def _code_object(assembly: str) -> tuple[int, int, list[str]]:
    """The same of AMD's assembly text; scalar registers are not counted."""
    labels: dict[str, int] = {}
    names: list[str] = []
    jumps: list[tuple[int, int]] = []
    for line in assembly.splitlines():
        label = _AMD_LABEL.match(line)
        if label:
            labels[label.group(1)] = len(names)
            continue
        instruction = _AMD_INSTRUCTION.match(line)
        if instruction:
            target = re.search(r"\.LBB\w+", instruction.group(2))
            if instruction.group(1).startswith(_AMD_BRANCHES) and target and target.group(0) in labels:
                jumps.append((labels[target.group(0)], len(names)))
            names.append(instruction.group(1))
    return _count(assembly, "vgpr_count"), _count(assembly, "vgpr_spill_count"), _loop(names, jumps, _AMD_MATRIX)


def _count(assembly: str, key: str) -> int:
    found = re.search(rf"\.{key}:\s+(\d+)", assembly)
    if found is None:
        raise ResourceError(f"the assembly does not say its {key}")
    return int(found.group(1))


def _loop(names: list[str], jumps: list[tuple[int, int]], matrix: tuple[str, ...]) -> list[str]:
    """What a jump back repeats around matrix instructions and around no other such loop; the costliest of several.

    Where loops were unrolled away it goes from the first such instruction to the last; it is empty where there is none.
    """
    places = [place for place, name in enumerate(names) if name.startswith(matrix)]
    if not places:
        return []
    loops = [(start, end) for start, end in jumps if any(start <= place <= end for place in places)]
    inner = [
        (start, end)
        for start, end in loops
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in loops)
    ]
    bodies = [names[start : end + 1] for start, end in inner] or [names[places[0] : places[-1] + 1]]
    return max(bodies, key=lambda body: len(body) / max(sum(map(_multiplied, body)), 1))


def _multiplied(name: str) -> int:
    """Products of two numbers that one matrix instruction of a warp makes; 0 for other instructions."""
    if name.startswith("HMMA.1688"):
        return 16 * 8 * 8
    if name.startswith("HMMA.16816"):
        return 16 * 8 * 16
    shape = re.match(r"(?:HGMMA\.|v_mfma_f32_|v_wmma_f32_)(\d+)x(\d+)x(\d+)", name)
    if shape is None:
        return 0
    size = math.prod(map(int, shape.groups()))
    # four warps issue one together
    return size // 4 if name.startswith("HGMMA") else size


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
