"""Reads what disassemblers print of a kernel: its instructions in order, the jumps back, what each multiplies.

A product with a constant matrix is a sum of rows and multiplies no weights. Constants are found by following registers
through the text from its beginning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

_NVIDIA_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_NVIDIA_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)(.*)")
_NVIDIA_REGISTER = re.compile(r"\bR(\d+)\b")
_NVIDIA_READING = ("LD", "S2R", "SHFL", "ATOM", "HMMA", "HGMMA")
_NVIDIA_WITHOUT_RESULT = ("ST", "BRA", "BAR", "LDGSTS", "RED", "EXIT", "WARPGROUP", "UMOV", "LDGDEPBAR", "DEPBAR")
_AMD_LABEL = re.compile(r"^(\.LBB\w+):")
_AMD_LINE = re.compile(r"^\t([a-z]\w+)(.*)")
_AMD_REGISTERS = re.compile(r"\b([va])(?:(\d+)\b|\[(\d+):(\d+)\])")
_AMD_BRANCHES = ("s_cbranch", "s_branch")
_AMD_WITHOUT_RESULT = ("global_store", "buffer_store", "ds_write", "ds_store", "scratch_store", "s_")
_AMD_MATRIX = ("v_mfma", "v_wmma")


@dataclass(frozen=True)
class Instruction:
    """`is_product`: of matrices. `multiplied`: products of a weight and a number that a warp makes with it."""

    name: str
    is_product: bool = False
    multiplied: int = 0


@dataclass(frozen=True)
class Code:
    """Instructions in order, and jumps back as (first, last) instruction of what they repeat."""

    instructions: tuple[Instruction, ...]
    jumps: tuple[tuple[int, int], ...]

    def loop(self) -> tuple[Instruction, ...]:
        """What a jump repeats around matrix products and around no other such loop; the costliest of several.

        Where loops were unrolled away it goes from the first product to the last; it is empty where there is none.
        """
        places = [place for place, item in enumerate(self.instructions) if item.is_product]
        if not places:
            return ()
        loops = [(start, end) for start, end in self.jumps if any(start <= place <= end for place in places)]
        inner = [
            (start, end)
            for start, end in loops
            if not any((start, end) != other and start <= other[0] and other[1] <= end for other in loops)
        ]
        bodies = [self.instructions[start : end + 1] for start, end in inner or [(places[0], places[-1])]]
        return max(bodies, key=lambda body: len(body) / max(sum(item.multiplied for item in body), 1))


def read_sass(text: str) -> Code:
    """The text of nvdisasm."""
    labels: dict[str, int] = {}
    found: list[Instruction] = []
    jumps: list[tuple[int, int]] = []
    constants: set[int] = set()
    for line in text.splitlines():
        label = _NVIDIA_LABEL.match(line)
        if label:
            labels[label.group(1)] = len(found)
            continue
        matched = _NVIDIA_LINE.search(line)
        if matched is None:
            continue
        name, rest = matched.groups()
        target = re.search(r"\.L_x_\d+", rest)
        if name.startswith("BRA") and target and target.group(0) in labels:
            jumps.append((labels[target.group(0)], len(found)))
        registers = [int(number) for number in _NVIDIA_REGISTER.findall(rest)]
        size = _shape_product(name)
        if size and name.startswith(("HMMA", "HGMMA")) and len(registers) > 1:
            sums_rows = {registers[1] + place for place in range(4)} <= constants
            found.append(Instruction(name, True, 0 if sums_rows else size))
        else:
            found.append(Instruction(name, name.startswith(("HMMA", "HGMMA", "UTCHMMA", "IMMA", "IGMMA"))))
        if registers and not name.startswith(_NVIDIA_WITHOUT_RESULT):
            written = set(range(registers[0], registers[0] + _written(name)))
            if set(registers[1:]) <= constants and not name.startswith(_NVIDIA_READING):
                constants |= written
            else:
                constants -= written
    return Code(tuple(found), tuple(jumps))


def read_amdgcn(text: str) -> Code:
    """Assembly text as LLVM prints it."""
    labels: dict[str, int] = {}
    found: list[Instruction] = []
    jumps: list[tuple[int, int]] = []
    constants: set[tuple[str, int]] = set()
    for line in text.splitlines():
        label = _AMD_LABEL.match(line)
        if label:
            labels[label.group(1)] = len(found)
            continue
        matched = _AMD_LINE.match(line)
        if matched is None:
            continue
        name, rest = matched.groups()
        target = re.search(r"\.LBB\w+", rest)
        if name.startswith(_AMD_BRANCHES) and target and target.group(0) in labels:
            jumps.append((labels[target.group(0)], len(found)))
        operands = list(_amd_operands(rest))
        size = _shape_product(name)
        if size and len(operands) > 2:
            sums_rows = operands[1] <= constants or operands[2] <= constants
            found.append(Instruction(name, True, 0 if sums_rows else size))
        else:
            found.append(Instruction(name, name.startswith(_AMD_MATRIX)))
        for part_name, part in _parts(name, rest):
            written = next(iter(_amd_operands(part)), None)
            if written is None or part_name.startswith(_AMD_WITHOUT_RESULT):
                continue
            others = list(_amd_operands(part))[1:]
            if "mov" in part_name and all(item <= constants for item in others):
                constants |= written
            else:
                constants -= written
    return Code(tuple(found), tuple(jumps))


def _shape_product(name: str) -> int:
    """Products of two numbers that a matrix instruction of a warp makes; 0 for other instructions."""
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


def _written(name: str) -> int:
    """Registers that an instruction of NVIDIA writes."""
    if name.startswith(("HMMA", "HGMMA")):
        shape = re.match(r"HGMMA\.64x(\d+)x", name)
        return 4 if shape is None else int(shape.group(1)) // 2
    if ".128" in name or name.endswith(".4"):
        return 4
    return 2 if ".64" in name or ".WIDE" in name or name.endswith(".2") or name.startswith("CS2R") else 1


def _parts(name: str, rest: str) -> Iterable[tuple[str, str]]:
    """The two halves of an instruction that does two things."""
    first, _, second = rest.partition("::")
    yield name, first
    if second:
        words = second.split(maxsplit=1)
        yield words[0], words[1] if len(words) > 1 else ""


def _amd_operands(text: str) -> Iterable[frozenset[tuple[str, int]]]:
    """The vector registers of each operand."""
    for kind, single, first, last in _AMD_REGISTERS.findall(text):
        numbers = [int(single)] if single else range(int(first), int(last) + 1)
        yield frozenset((kind, number) for number in numbers)
