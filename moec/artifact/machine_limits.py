"""What the machine could do at best: bytes read from memory per second, and multiplications per second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_MIB = 1 << 20
_MATRIX = 1024
_ROUNDS = 5


@dataclass(frozen=True)
class MachineLimits:
    """`bandwidth` in bytes per second over a working set of `working_set` bytes; `flops` of float32 products."""

    bandwidth: float
    flops: float
    working_set: int


def measure_limits(working_set: int, threads: int) -> MachineLimits:
    """Best of several rounds of reading `working_set` bytes, and of a product of two square matrices.

    A model that fits into the cache is read from the cache, so the working set is that of the model.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        size = max(working_set, _MIB) // 4 // _MATRIX
        table, vector = torch.ones(max(size, 1), _MATRIX), torch.ones(_MATRIX)
        left, right = torch.ones(_MATRIX, _MATRIX), torch.ones(_MATRIX, _MATRIX)
        bandwidth = table.nbytes / _best(lambda: torch.mv(table, vector))
        flops = 2 * _MATRIX**3 / _best(lambda: torch.mm(left, right))
    finally:
        torch.set_num_threads(before)
    return MachineLimits(bandwidth, flops, table.nbytes)


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of several rounds, each long enough for the clock."""
    work()
    best = float("inf")
    for _ in range(_ROUNDS):
        repeats, taken, start = 0, 0.0, time.perf_counter()
        while taken < 0.02:
            work()
            repeats += 1
            taken = time.perf_counter() - start
        best = min(best, taken / repeats)
    return best
