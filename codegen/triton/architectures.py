"""The GPU architectures that kernels are compiled for, with the limits that decide what fits on them."""

from __future__ import annotations

from dataclasses import dataclass

from moec.errors import UsageError


@dataclass(frozen=True)
class Architecture:
    """One target of Triton's compiler and the resources of its unit of scheduling (SM, compute unit).

    `name` is as in `tiles.json`; `backend`, `target` and `warp` as Triton names them. `shared_bytes` is what one
    program may have, `unit_shared_bytes` what a unit has for all its programs. Sources: CUDA C++ programming guide,
    table of technical specifications per compute capability; AMD CDNA 3 and RDNA 3 instruction set guides.
    """

    name: str
    backend: str
    target: int | str
    warp: int
    shared_bytes: int
    unit_shared_bytes: int
    registers: int
    threads: int
    blocks: int

    @property
    def is_nvidia(self) -> bool:
        """Whether its binaries are cubins."""
        return self.backend == "cuda"


_KIB = 1024

ARCHITECTURES = (
    Architecture("sm80", "cuda", 80, 32, 163 * _KIB, 164 * _KIB, 65536, 2048, 32),
    Architecture("sm89", "cuda", 89, 32, 99 * _KIB, 100 * _KIB, 65536, 1536, 24),
    Architecture("sm90", "cuda", 90, 32, 227 * _KIB, 228 * _KIB, 65536, 2048, 32),
    Architecture("sm100", "cuda", 100, 32, 227 * _KIB, 228 * _KIB, 65536, 2048, 32),
    Architecture("sm120", "cuda", 120, 32, 99 * _KIB, 100 * _KIB, 65536, 1536, 24),
    Architecture("gfx942", "hip", "gfx942", 64, 64 * _KIB, 64 * _KIB, 131072, 2048, 32),
    Architecture("gfx1100", "hip", "gfx1100", 32, 64 * _KIB, 128 * _KIB, 196608, 2048, 32),
)
"""In the order in which reports list them."""


def parse_architectures(text: str) -> tuple[Architecture, ...]:
    """Those of names separated by commas, all of them for an empty text. Raises UsageError for an unknown one."""
    known = {item.name: item for item in ARCHITECTURES}
    names = [name.strip() for name in text.split(",")] if text else list(known)
    for name in names:
        if name not in known:
            raise UsageError(f"there is no architecture {name!r}", hint=f"known are {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names))


def architecture(name: str) -> Architecture:
    """The architecture of a name. Raises KeyError for an unknown one."""
    return {item.name: item for item in ARCHITECTURES}[name]
