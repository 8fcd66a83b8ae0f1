"""Which limit of a GPU a kernel meets first: memory, the issue of instructions, or matrix products.

It is a bound, not a time: latency, caches and launches are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from moec.codegen.triton.tiles import Phase

PREFILL_ROWS = 512
"""Rows of an expert in prefill."""


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet.

    Units, lanes that issue at once in a unit, boost clock in Hz, memory in bytes per second, and dense products of
    16-bit numbers with float32 sums in operations per second.
    """

    name: str
    architecture: str
    units: int
    lanes: int
    clock: float
    bandwidth: float
    products: float


GPUS = (
    Gpu("A100 80GB SXM", "sm80", 108, 128, 1.41e9, 2.039e12, 312e12),
    Gpu("L40S", "sm89", 142, 128, 2.52e9, 0.864e12, 362e12),
    Gpu("H100 SXM", "sm90", 132, 128, 1.755e9, 3.35e12, 989e12),
    Gpu("B200", "sm100", 148, 128, 1.965e9, 8.0e12, 2250e12),
    Gpu("RTX 5090", "sm120", 170, 128, 2.407e9, 1.792e12, 209e12),
    Gpu("MI300X", "gfx942", 304, 64, 2.1e9, 5.3e12, 1307e12),
    Gpu("RX 7900 XTX", "gfx1100", 96, 64, 2.5e9, 0.96e12, 123e12),
)
"""One for each architecture, from the vendors' data sheets."""


class Bound(Enum):
    """What takes longest."""

    MEMORY = "memory"
    ISSUE = "issue"
    PRODUCTS = "products"


@dataclass(frozen=True)
class Prediction:
    """The bound of a kernel on a GPU. `issue` is the time to issue its instructions over that of the other limits."""

    gpu: str
    bound: Bound
    issue: float


def predict(gpu: Gpu, phase: Phase, block_m: int, bits: float, instructions: float) -> Prediction:
    """For a weight of `bits` that takes `instructions` of a thread for each block of `block_m` rows.

    In decode a weight is read for one block of rows; in prefill for `PREFILL_ROWS`.
    """
    rows = PREFILL_ROWS if phase is Phase.MANY else 1
    blocks = -(-rows // block_m)
    times = {
        Bound.MEMORY: bits / 8 / gpu.bandwidth,
        Bound.ISSUE: instructions * blocks / (gpu.units * gpu.lanes * gpu.clock),
        Bound.PRODUCTS: 2 * rows / gpu.products,
    }
    others = max(times[Bound.MEMORY], times[Bound.PRODUCTS])
    return Prediction(gpu.name, max(times, key=lambda bound: times[bound]), times[Bound.ISSUE] / others)


def gpu_of(architecture: str) -> Gpu:
    """The GPU of an architecture."""
    return {gpu.architecture: gpu for gpu in GPUS}[architecture]
