"""What one core of this machine can do at most: bytes read per second and multiply-adds per second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

READ_BYTES = 256 << 20
PRODUCT_SHAPE = (512, 1024, 2816)


def cpu_seconds(call: Callable[[], object]) -> float:
    """Seconds that this thread computed for `call`: what other processes take of the core is not counted."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


@dataclass
class MachineLimits:
    """Call `measure` once in every round of a benchmark; the properties are over all rounds."""

    read_seconds: dict[str, list[float]] = field(default_factory=lambda: {"sum": [], "matrix times vector": []})
    product_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._matrix = torch.ones(READ_BYTES // 4096, 1024)
        self._vector = torch.ones(1024)
        self._left = torch.rand(PRODUCT_SHAPE[0], PRODUCT_SHAPE[1])
        self._right = torch.rand(PRODUCT_SHAPE[1], PRODUCT_SHAPE[2])

    def measure(self) -> None:
        """One more reading of both limits, on one thread."""
        self.read_seconds["sum"].append(cpu_seconds(self._matrix.sum))
        self.read_seconds["matrix times vector"].append(cpu_seconds(lambda: self._matrix @ self._vector))
        self.product_seconds.append(cpu_seconds(lambda: self._left @ self._right))

    @property
    def bytes_per_second(self) -> float:
        """Bytes read per second, the median of the faster way to read."""
        return READ_BYTES / min(statistics.median(seconds) for seconds in self.read_seconds.values())

    @property
    def flops_per_second(self) -> float:
        """Floating-point operations per second in a float32 matrix product, the median."""
        rows, inner, columns = PRODUCT_SHAPE
        return 2 * rows * inner * columns / statistics.median(self.product_seconds)
