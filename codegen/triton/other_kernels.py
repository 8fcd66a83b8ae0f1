"""Kernels beside the two products of experts: those of factored matrices, and the one that makes slots of choices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from moec.codegen.triton.tiles import Phase

_EXPAND = (("BLOCK_T", 16), ("BLOCK_K", 128))


@dataclass(frozen=True)
class OtherKernel:
    """A kernel by its name, the product whose tile it takes in a phase, and constants beside the tile's."""

    name: str
    product: str
    phase: Phase
    constants: tuple[tuple[str, object], ...] = ()


def other_kernels(kind: ModuleType) -> Iterator[OtherKernel]:
    """What the launcher starts for a kind of layer, from its module."""
    names = frozenset(kind.FACTORS)
    if "parts" in names:
        yield OtherKernel("expand_slots", "", Phase.SLOTS, _EXPAND)
    for phase in Phase:
        form = "slots" if phase is Phase.SLOTS else "grouped"
        if "input_latent" in names:
            yield OtherKernel("latent_rows", "gate_up", phase)
        if "input_right" in names:
            yield OtherKernel(f"input_right_{form}", "gate_up", phase)
        if "output_right" in names:
            yield OtherKernel(f"output_right_{form}", "down", phase)
        if "output_latent" in names:
            rows = (1 if phase is Phase.SLOTS else kind.SLOTS) if kind.HAS_DOWN else 0
            yield OtherKernel("finish", "down", phase, (("ROWS", rows),))
