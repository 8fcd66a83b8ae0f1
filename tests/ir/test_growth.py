"""Printing, reading and verifying take time in proportion to the module."""

from __future__ import annotations

from tests.benchmarks.ir import measure


def test_ten_times_the_operations_cost_about_ten_times() -> None:
    small, large = measure(5_000), measure(50_000, repeats=2)
    assert large.operations > 9.9 * small.operations
    # a quadratic step would give 100; the least of several runs keeps a busy machine out of the ratio
    for name in ("print", "parse", "verify"):
        ratio = getattr(large, name) / getattr(small, name)
        assert ratio <= 14, f"{name}: {ratio:.1f} times for ten times the operations"
